"""Right and broken outputs for the miniature's editions of the benchmarks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from imgen_common.shapes.render import draw
from imgen_common.shapes.scene import Spec, Thing, parse_caption
from imgen_common.shapes.stories import read_prompt, sample_story
from imgen_common.streams import numpy_generator
from interleave.agents.miniature import detect_things
from interleave.benchmarks.base import Item, Output
from interleave.protocols import HashedImage


def picture(spec: Spec, file: Path) -> Path:
    """A true image of a caption."""
    rng = np.random.default_rng(int.from_bytes(file.stem.encode()[-4:]))
    pixels = draw([spec], rng)[0].transpose(1, 2, 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(file)
    return file


def of_things(things: Sequence[Thing], file: Path) -> Path:
    return picture(Spec("two" if len(things) > 1 else "single", tuple(things)), file)


def right(name: str, items: Sequence[Item], folder: Path) -> dict[str, Output]:
    """Outputs that do all that was asked."""
    if name in ("ueval", "comm"):
        counts = {"ueval": lambda number: 1 + number % 3, "comm": lambda number: 2 + number % 2}[name]
        rng = numpy_generator(0, f"benchmark-{name}")
        stories = [sample_story(rng, "test", num_steps=counts(number)) for number in range(24)]
        by_request = {story.request: story for story in stories}
        found = {}
        for item in items:
            content: list[str | Path] = []
            for number, step in enumerate(by_request[str(item.content[0])].steps, 1):
                file = folder / f"{item.id}-{number}.png"
                content += [step.text, of_things(step.after, file)]
            found[item.id] = Output(tuple(content))
        return found
    if name == "rise":
        return {item.id: Output((_edited(item, folder / f"{item.id}.png"),)) for item in items}
    captions = {item.id: item.row["Explanation"].removeprefix("The image shows ").removesuffix(".") for item in items}
    return {key: Output((picture(parse_caption(said), folder / f"{key}.png"),)) for key, said in captions.items()}


def _edited(item: Item, file: Path) -> Path:
    source = HashedImage.from_pil(Image.open(item.root / item.row["image"]))
    step = read_prompt(item.row["instruction"], [found.thing for found in detect_things(source)])
    assert step is not None
    return of_things(step.after, file)


def broken(outputs: dict[str, Output], folder: Path) -> dict[str, Output]:
    """As many images, all white, and words of something else."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "white").save(folder / "white.png")
    return {
        key: Output(tuple("Nothing." if isinstance(part, str) else folder / "white.png" for part in output.content))
        for key, output in outputs.items()
    }
