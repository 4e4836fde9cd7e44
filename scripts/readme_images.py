"""Makes the images of the README from a finished training run and a finished story.

    uv run flowbp train
    uv run interleave run "draw a yellow circle, then make it red, then add a blue square below it" \\
        --name story
    uv run python scripts/readme_images.py runs/flowbp_bridge runs/story

It shows the first images of the evaluation without selection: those before training above, those after it below, from
the same noise.
"""

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

OUT = Path(__file__).parents[1] / "docs" / "images"
SIDE, GAP, HEAD = 128, 8, 64
"""Pixels: side of an image, space between images, height of the text above a column."""


def paste_column(sheet: Image.Image, column: int, text: str, files: Sequence[Path]) -> None:
    """Pastes images below each other, each pixel enlarged to a square, with `text` above them."""
    left = GAP + column * (SIDE + GAP)
    lines, font = "\n".join(textwrap.wrap(text, 20)), ImageFont.load_default(12)
    ImageDraw.Draw(sheet).text((left, GAP), lines, fill="black", font=font)
    for row, file in enumerate(files):
        image = Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
        sheet.paste(image, (left, HEAD + row * (SIDE + GAP)))


def make_sheet(columns: int, rows: int) -> Image.Image:
    """A white image with room for a grid of images."""
    return Image.new("RGB", (columns * (SIDE + GAP) + GAP, HEAD + rows * (SIDE + GAP)), "white")


def draw_before_and_after(run: Path, columns: int = 6) -> Image.Image:
    """The first images of the evaluations before and after training, at the guidance scale of the training."""
    folders = [run / "evaluations" / f"{name}-g1" for name in ("base", "trained")]
    prompts = json.loads((folders[0] / "scores.json").read_text(encoding="utf-8"))["prompts"][:columns]
    sheet = make_sheet(columns, len(folders))
    for column, prompt in enumerate(prompts):
        paste_column(sheet, column, prompt, [folder / f"{column:03d}.png" for folder in folders])
    return sheet


def draw_story(run: Path) -> Image.Image:
    """The selected images of a story with their prompts."""
    records = [json.loads(line) for line in (run / "trace.jsonl").read_text(encoding="utf-8").splitlines()]
    selected = next(record["selected"] for record in records if record["type"] == "trajectory")
    attempts = [r for r in records if r["type"] == "attempt" and selected.get(str(r["step"])) == r["attempt"]]
    attempts.sort(key=lambda record: record["step"])
    sheet = make_sheet(len(attempts), 1)
    for column, record in enumerate(attempts):
        files = list(run.rglob(f"{record['image_id']}.png"))
        paste_column(sheet, column, f"{record['step']}. {record['original_prompt']}", files)
    return sheet


def main() -> None:
    """Writes docs/images/before_after.png and docs/images/story.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of flowbp train")
    parser.add_argument("story", type=Path, help="run folder of interleave run")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    draw_before_and_after(options.run).save(OUT / "before_after.png")
    draw_story(options.story).save(OUT / "story.png")


if __name__ == "__main__":
    main()
