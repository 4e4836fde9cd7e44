"""The verifier of the shapes world as a chat model: it answers the benchmarks' built-in questions about its images.

It takes no part in what is asked: it reads the same words as any judge, and answers in the form that they ask for.
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil

from imgen_common.judging.cost import Prices
from imgen_common.shapes.scene import COLOURS, SHAPES, Thing, parse_caption
from imgen_common.shapes.stories import read_prompt
from imgen_common.shapes.verify import Detection, caption_holds
from interleave.agents.miniature import detect_things
from interleave.protocols import BackendError, HashedImage, Message, Reply, split_system

THING = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
TURNS = re.compile(rf"(?:{'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) turns ({'|'.join(COLOURS)})")
SHAPE = re.compile(rf"\b({'|'.join(SHAPES)})")
Images = Sequence[HashedImage]


class ShapesJudge:
    """Answers whatever question of a benchmark the message holds."""

    id = "shapes verifier"

    async def chat(self, message: Message, seed: int) -> Reply:
        """The answer.  Raises BackendError, `refused`, for a question that it does not know."""
        system, turn = split_system(message)
        text = system + "\n" + "".join(part for part in turn if isinstance(part, str))
        images = [part for part in turn if not isinstance(part, str)]
        for sign, answer in ANSWERS.items():
            if sign in text:
                said = answer(text, images) if sign not in STORIES else STORIES[sign](turn)
                return Reply(said, _num_tokens(text, images), _num_tokens(said, ()))
        raise BackendError("refused", "the shapes judge answers the built-in questions of benchmarks only")

    async def close(self) -> None:
        """Nothing to release."""


def _num_tokens(text: str, images: Images) -> int:
    prices = Prices()
    pixels = sum(image.image.width * image.image.height for image in images)
    return ceil(len(text) / prices.characters_per_token) + ceil(pixels / prices.pixels_per_token)


def _things(text: str) -> list[Thing]:
    return [Thing(*found) for found in THING.findall(text)]


def _shown(image: HashedImage) -> list[Thing]:
    return sorted(found.thing for found in detect_things(image))


def _is_clean(found: Sequence[Detection]) -> bool:
    return bool(found) and not any(d.thing.colour == "mixed" or d.thing.shape == "blob" for d in found)


def _after(text: str, sign: str) -> str:
    """The paragraph after the last sign.  Raises BackendError where there is none."""
    _, found, after = text.rpartition(sign)
    if not found:
        raise BackendError("refused", f"the shapes judge looks for {sign!r} in the question")
    return after.strip().split("\n\n")[0].strip().strip('"')


# --- UEval and WISE --------------------------------------------------------------------------------------------------


def _answer_ueval(text: str, images: Images) -> str:
    wanted = _after(text, "Requirement:\n")
    if numbered := re.match(r"Image (\d+) shows", wanted):
        index = int(numbered[1]) - 1
        met = index < len(images) and set(_things(wanted)) <= set(_shown(images[index]))
    else:
        met = set(SHAPE.findall(wanted)) <= set(SHAPE.findall(_after(text, "Words of the reply:\n")))
    return json.dumps({"criteria_met": met})


def _holds(text: str, image: HashedImage) -> bool:
    meant = _after(text, "EXPLANATION:").removeprefix("The image shows ").removesuffix(".")
    return caption_holds(detect_things(image), parse_caption(meant))


def _answer_wise(text: str, images: Images) -> str:
    return f"Score: {int(_holds(text, images[0]))}"


def _answer_wise_legacy(text: str, images: Images) -> str:
    clean = 2 if _is_clean(detect_things(images[0])) else 0
    meant = set(_things(_after(text, "EXPLANATION:")))
    partly = int(bool(meant & set(_shown(images[0]))))
    right = 2 if _holds(text, images[0]) else partly
    return f"Consistency: {right}\nRealism: {clean}\nAesthetic Quality: {clean}"


# --- RISEBench -------------------------------------------------------------------------------------------------------


def _answer_rise(text: str, images: Images) -> str:
    if "believable" in text or "technical quality" in text:
        score = 5 if _is_clean(detect_things(images[0])) else 1
    elif "correct result shows:" in text or "correct answer:" in text:
        wanted = _after(text, "correct result shows:" if "correct result shows:" in text else "correct answer:")
        right = sorted(_things(wanted)) == _shown(images[-1])
        score = int(right) if "correct answer:" in text else 5 if right else 1
    elif "shows a correct result" in text or "shows a correct answer" in text or "shows the correct answer" in text:
        right = _shown(images[0]) == _shown(images[-1])
        score = 5 if right and "correct result" in text else int(right) or int("correct result" in text)
    else:
        score = _consistency(text, images)
    return f"**Final Score:** **{score}**"


def _consistency(text: str, images: Images) -> int:
    """Whether what the instruction leaves alone is still there: 1 or 5, of logical items 0 or 1.

    Where the instruction says nothing of the first image, as when that is the answer already, all of it must be there.
    """
    before, after = (_shown(image) for image in (images[0], images[-1]))
    steps = (read_prompt(line.strip(), before) for line in text.splitlines())
    step = next((found for found in steps if found is not None), None)
    kept = set(before if step is None else getattr(step, "untouched", ())) <= set(after)
    is_logical = "1 if" in text
    return int(kept) if is_logical else 5 if kept else 1


# --- CoMM ------------------------------------------------------------------------------------------------------------


def _output(turn: Message) -> list[tuple[str, HashedImage]]:
    """The images of the output, each with the words before it."""
    found: list[tuple[str, HashedImage]] = []
    words, is_output = "", "OUTPUT:" not in turn
    for part in turn:
        if isinstance(part, str):
            is_output = is_output or part == "OUTPUT:"
            words = "" if part == "OUTPUT:" else words + part
        elif is_output:
            found.append((words, part))
            words = ""
    return found


def _share(held: Sequence[bool]) -> int:
    return round(10 * sum(held) / len(held)) if held else 0


def _answer_coherence(turn: Message) -> str:
    story = _output(turn)
    shown = [set(_shown(image)) for _, image in story]
    style = _share([_is_clean(detect_things(image)) for _, image in story])
    shapes = [{thing.shape for thing in things} for things in shown]
    entity = _share([bool(a & b) for a, b in pairwise(shapes)] or [bool(shapes and shapes[0])])
    trend = _share([_fits(words, image) for words, image in story])
    scores = {"style_consistency": style, "entity_consistency": entity, "trend_consistency": trend}
    overall = scores | {"overall_consistency": round(sum(scores.values()) / 3)}
    coherence = {"pair_scores": {}, "overall_score": overall}
    found = {"Image_Coherence": coherence, "Completeness": {"Score": trend}, "Image_Quality": {"Score": style}}
    return json.dumps({"scores": found})


def _fits(words: str, image: HashedImage) -> bool:
    """Whether an image shows the colored shapes that its words name, or else a shape that they name; what they say is
    gone must not be there."""
    shown, wanted = set(_shown(image)), set(_things(TURNS.sub(r"\2 \1", words)))
    if "gone" in words:
        return bool(shown) and not wanted & shown
    return wanted <= shown if wanted else bool({thing.shape for thing in shown} & set(SHAPE.findall(words)))


def _answer_descriptions(turn: Message) -> str:
    text = "".join(part for part in turn if isinstance(part, str)).rpartition("OUTPUT:")[2]
    pieces = re.split(r"<Img_(\d+)>", text)
    described = {
        f"Content of Image {number}": words.rpartition("</Img_")[2].partition(">")[2] or words
        for words, number in zip(pieces[::2], pieces[1::2], strict=False)
    }
    return json.dumps({"Tasks": {"Create an Interleaved Text-Image Document": described}})


def _answer_match(turn: Message) -> str:
    texts = re.findall(
        r"<Description_\d+>(.*?)</Description", "".join(p for p in turn if isinstance(p, str)), re.DOTALL
    )
    images = [part for part in turn if not isinstance(part, str)]
    score = _share([_fits(words, image) for words, image in zip(texts, images, strict=False)])
    return json.dumps({"Consistency": {"overall_score": score}})


STORIES: dict[str, Callable[[Message], str]] = {
    "<Description_0>": _answer_match,
    "Content of Image": _answer_descriptions,
    "Image_Coherence": _answer_coherence,
}
ANSWERS: dict[str, Callable[[str, Images], str]] = {
    "criteria_met": _answer_ueval,
    "Aesthetic Quality:": _answer_wise_legacy,
    "EXPLANATION:": _answer_wise,
    "Final Score": _answer_rise,
    **dict.fromkeys(STORIES, _answer_wise),
}
"""What tells a question, and what answers it."""
