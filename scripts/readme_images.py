"""Makes the images of the README from a finished training run and a finished story.

    uv run flowbp train
    uv run interleave run "draw a red circle, then add a blue square on its right, then make the circle green" \\
        --name story
    uv run python scripts/readme_images.py runs/flowbp_bridge runs/story

It shows the first images of the evaluation without selection: those before training above, those after it below, from
the same noise.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

OUT = Path(__file__).parents[1] / "docs" / "images"
SIDE, GAP, LINE = 128, 8, 18


def make_sheet(columns: int, rows: int, margin: int) -> Image.Image:
    """A white image for a grid of squares with a line of text above each row."""
    width = margin + columns * (SIDE + GAP) + GAP
    return Image.new("RGB", (width, rows * (SIDE + LINE + GAP) + GAP), "white")


def paste_image(sheet: Image.Image, image: Image.Image, text: str, left: int, top: int) -> None:
    """Pastes an image, each of its pixels enlarged to a square, under a line of text."""
    ImageDraw.Draw(sheet).text((left, top), text, fill="black", font=ImageFont.load_default(11))
    sheet.paste(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top + LINE))


def draw_before_and_after(run: Path, columns: int = 8) -> Image.Image:
    """The first images of the evaluations before and after training, at the guidance scale of the training."""
    folders = [run / "evaluations" / f"{name}-g1" for name in ("base", "trained")]
    prompts = json.loads((folders[0] / "scores.json").read_text(encoding="utf-8"))["prompts"][:columns]
    sheet = make_sheet(columns, len(folders), 0)
    for row, folder in enumerate(folders):
        for column, prompt in enumerate(prompts):
            text = prompt if row == 0 else ""
            place = (GAP + column * (SIDE + GAP), GAP + row * (SIDE + LINE + GAP))
            paste_image(sheet, Image.open(folder / f"{column:03d}.png"), text[:24], *place)
    return sheet


def draw_story(run: Path) -> Image.Image:
    """The selected images of a story with their prompts."""
    records = [json.loads(line) for line in (run / "trace.jsonl").read_text(encoding="utf-8").splitlines()]
    selected = next(record["selected"] for record in records if record["type"] == "trajectory")
    attempts = [r for r in records if r["type"] == "attempt" and selected.get(str(r["step"])) == r["attempt"]]
    attempts.sort(key=lambda record: record["step"])
    sheet = Image.new("RGB", (len(attempts) * (2 * SIDE + GAP) + GAP, SIDE + LINE + 2 * GAP), "white")
    for column, record in enumerate(attempts):
        (file,) = run.rglob(f"{record['image_id']}.png")
        paste_image(
            sheet,
            Image.open(file),
            f"{record['step']}. {record['original_prompt']}",
            GAP + column * (2 * SIDE + GAP),
            GAP,
        )
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
