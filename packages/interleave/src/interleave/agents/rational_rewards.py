"""Reads the answers of RationalRewards.  Whatever the text, the result is a value or `ParseFailure`, never a raise.

An answer has headings: each aspect with `Score:` (1 to 4) and `Justification:`, then `Summary:`, and last
`Refined Request:`, a better prompt.  Time is linear in the length.  Source of the headings and the scale:
RationalRewards, arXiv 2604.11626, and the README and scripts of TIGER-AI-Lab/RationalRewards on GitHub.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from imgen_common.http.chat import split_reasoning
from interleave.agents.parsing import ParseFailure
from interleave.records import Verdict

EDIT_ASPECTS = ("Text Faithfulness", "Image Faithfulness", "Physical and Visual Quality", "Text Rendering")
T2I_ASPECTS = ("Text Faithfulness", "Physical and Visual Quality", "Text Rendering")
OPTIONAL_ASPECT = "Text Rendering"
"""The aspect whose score may be N/A, where no text was asked for."""
MIN_SCORE, MAX_SCORE = 1.0, 4.0

SCORE, JUSTIFICATION, REFINED = "Score", "Justification", "Refined Request"
SECTIONS = (
    *("User Request Analysis", "Detailed Judgement", "Detailed Judgment", "Summary"),
    *("User Request Refinement", "Refinement Comments", REFINED),
)
HEADINGS = {name.lower(): name for name in (*EDIT_ASPECTS, *SECTIONS, SCORE, JUSTIFICATION)}
MARKS = " \t#*_"
"""What Markdown puts around a heading."""
NUMBER = re.compile(r"[0-9][.)]")
RULE = re.compile(r"(?:-{3,}|\*{3,}|_{3,})\s*")
VALUE = re.compile(
    r"\[? ?(?:(?P<none>N/A)|(?P<number>[0-9]+(?:\.[0-9]+)?)(?: ?(?:/|out of) ?4(?:\.0+)?)?) ?\]?(?: ?\(.*\))?\.?",
    re.IGNORECASE,
)
"""A score: `3.5`, `[3.5]`, `3.5/4`, `3.5 (minor flaws)` or `N/A`; white space was collapsed before."""
NO_REQUEST = ("", "n/a", "none")


@dataclass(frozen=True)
class Critique:
    """What the critic says.  scores: by aspect, each in [1, 4], None where it does not apply; larger is better."""

    scores: Mapping[str, float | None]
    reasoning: str
    refined_prompt: str

    def verdict(self, min_score: float, prompt_used: str) -> Verdict | ParseFailure:
        """Accepted where every score is at least `min_score`; what is rejected must come with another prompt."""
        success = all(score >= min_score for score in self.scores.values() if score is not None)
        if not success and not self.refined_prompt:
            return ParseFailure(f"a score is below {min_score:g}, but there is no {REFINED}")
        prompt = prompt_used if success else self.refined_prompt
        return Verdict(success=success, refined_prompt=prompt, reasoning=self.reasoning)


@dataclass
class _Entries:
    """What stands under the headings.  An answer may repeat itself, but not contradict itself."""

    scores: dict[str, list[str]] = field(default_factory=dict)
    justifications: dict[str, list[str]] = field(default_factory=dict)
    sections: dict[str, list[str]] = field(default_factory=dict)


def parse_critique(answer: str, aspects: Sequence[str]) -> Critique | ParseFailure:
    """The scores of all `aspects`, the explanation, and the refined request, empty where there is none.

    Lines before the first heading, code fences and Markdown's marks around headings are skipped.  An aspect without a
    score, with a score that is no number from 1 to 4, or with two different ones makes the answer unreadable.
    """
    try:
        answer.encode()
    except UnicodeEncodeError:
        return ParseFailure("it holds half of a surrogate pair")
    entries = _collect(split_reasoning(answer)[1])
    scores: dict[str, float | None] = {}
    for aspect in aspects:
        score = _score(aspect, entries.scores.get(aspect, []))
        if isinstance(score, ParseFailure):
            return score
        scores[aspect] = score
    requests = {text for text in entries.sections.get(REFINED, []) if text.lower().rstrip(".") not in NO_REQUEST}
    if len(requests) > 1:
        return ParseFailure(f"there are {len(requests)} different {REFINED}s")
    return Critique(scores, _explain(scores, entries), next(iter(requests), ""))


def _score(aspect: str, written: Sequence[str]) -> float | ParseFailure | None:
    """The one score of an aspect; None for N/A."""
    if not written:
        return ParseFailure(f"{aspect} has no score")
    values = set()
    for text in written:
        match = VALUE.fullmatch(" ".join(text.strip(MARKS).split()))
        if match is None:
            return ParseFailure(f"the score of {aspect} is no number from 1 to 4")
        values.add(float(match["number"]) if match["number"] else None)
    if len(values) > 1:
        return ParseFailure(f"{aspect} has {len(values)} different scores")
    (value,) = values
    if value is None and aspect != OPTIONAL_ASPECT:
        return ParseFailure(f"the score of {aspect} is N/A")
    if value is not None and not MIN_SCORE <= value <= MAX_SCORE:
        return ParseFailure(f"the score of {aspect} is outside 1 to 4")
    return value


def _explain(scores: Mapping[str, float | None], entries: _Entries) -> str:
    """The scores with their justifications, the lowest first, and the summary."""
    lines = []
    for aspect, score in sorted(scores.items(), key=lambda item: MAX_SCORE + 1 if item[1] is None else item[1]):
        if score is not None:
            lines.append(f"{aspect} {score:g} of 4. {next(iter(entries.justifications.get(aspect, [])), '')}".strip())
    return "\n".join([*lines, *entries.sections.get("Summary", [])[:1]]).strip()


def _collect(text: str) -> _Entries:
    entries, aspect = _Entries(), ""
    for heading, body in _headings(text):
        if heading in EDIT_ASPECTS:
            aspect = heading
        elif heading in (SCORE, JUSTIFICATION):
            kept = entries.scores if heading == SCORE else entries.justifications
            # A score under Summary, or anywhere else outside an aspect, is of no aspect
            if aspect:
                kept.setdefault(aspect, []).append(body.partition("\n")[0] if heading == SCORE else body)
        else:
            aspect = ""
            entries.sections.setdefault(heading, []).append(body)
    return entries


def _headings(text: str) -> Iterator[tuple[str, str]]:
    """Each heading and the text up to the next one, to a code fence or to a rule."""
    heading, lines, is_open = "", [""], False
    for line in text.replace("\r\n", "\n").split("\n"):
        bare = line.strip()
        found = _heading(bare, in_request=heading == REFINED)
        if found is not None:
            if heading:
                yield heading, "\n".join(lines).strip()
            heading, lines, is_open = found[0], [found[1]], True
        elif bare.startswith("```") or RULE.fullmatch(bare):
            is_open = is_open and not any(lines)
        elif is_open:
            lines.append(bare)
    if heading:
        yield heading, "\n".join(lines).strip()


def _heading(line: str, in_request: bool) -> tuple[str, str] | None:
    """The name of a heading and what stands behind its colon.  None for other text.

    A heading has a mark or a number before it or a colon behind it; after the refined request, which may hold any
    words, a `#`.
    """
    bare = line.lstrip(MARKS)
    if NUMBER.match(bare):
        bare = bare[2:].lstrip(MARKS)
    head, colon, rest = bare.partition(":")
    name = HEADINGS.get(head.partition("(")[0].rstrip(MARKS).lower())
    is_marked = line.startswith("#") or (not in_request and (bare != line or bool(colon)))
    if name is None or not is_marked:
        return None
    return name, rest.strip().removeprefix("**").strip()
