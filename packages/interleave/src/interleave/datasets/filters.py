"""From trajectories to rows: which of them are kept and to which set they go.

planner_sft  plans                  critic_sft  verdicts to imitate         critic_rl  pictures to judge, with scores

Source of the filters: InterleaveThinker, arXiv 2606.13679: steps whose score falls or stays low are dropped, those
whose scores vary most go to reinforcement, verdicts are balanced.  Thresholds are not published; ours are settings.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field

from imgen_common.streams import stream_key
from interleave.datasets.config import FiltersConfig
from interleave.datasets.rows import Story, pair
from interleave.records import Attempt, Record, Request

SetName = Literal["planner_sft", "critic_sft", "critic_rl"]
Split = Literal["train", "val"]
SETS: tuple[SetName, ...] = ("planner_sft", "critic_sft", "critic_rl")
SPLITS: tuple[Split, ...] = ("train", "val")
INFO = "set.json"
Item = TypeVar("Item")


def file_name(name: SetName, split: Split) -> str:
    """`planner_sft.jsonl`, `planner_sft.val.jsonl`."""
    return f"{name}.jsonl" if split == "train" else f"{name}.{split}.jsonl"


class Filtered(Record):
    """What one filter did.  of: to what; `dropped` of `given`."""

    filter: str
    of: str
    setting: Any
    given: int
    dropped: int


class SetInfo(Record):
    """What `set.json` says: it is written last, so that a folder with it holds whole sets.

    rows: by set and split.  trajectories, attempts: how many ended how.  unscored: pictures without a score, by what
    the judge's failure was.  categories: requests by category, whether they became complete or not.
    """

    rows: Mapping[str, Mapping[str, int]]
    source: str
    filters: tuple[Filtered, ...] = ()
    notes: tuple[str, ...] = ()
    seed: int | None = None
    judge: str | None = None
    scored: int = 0
    unscored: Mapping[str, int] = Field(default_factory=dict)
    trajectories: Mapping[str, int] = Field(default_factory=dict)
    attempts: Mapping[str, int] = Field(default_factory=dict)
    categories: Mapping[str, Mapping[str, int]] = Field(default_factory=dict)
    planners: tuple[str, ...] = ()
    generators: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    templates: Mapping[str, str] = Field(default_factory=dict)
    template_hashes: Mapping[str, str] = Field(default_factory=dict)
    versions: Mapping[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """One judged attempt of a story."""

    story: Story
    attempt: Attempt

    @property
    def step(self) -> tuple[str, int]:
        """Which step of which trajectory."""
        return self.attempt.trajectory_id, self.attempt.step

    @property
    def success(self) -> bool:
        """The critic's verdict."""
        return bool(self.attempt.verdict)

    @property
    def question(self) -> Hashable:
        """What a critic is asked about it."""
        return *pair(self.attempt), self.attempt.original_prompt, self.attempt.prompt_used

    @cached_property
    def score(self) -> float | None:
        """sqrt(semantics * quality) in [0, 10]; None where the judge did not score it."""
        scores = self.attempt.scores
        return None if scores is None else math.sqrt(scores.semantics * scores.quality)


@dataclass
class Sieve:
    """Keeps what passes, and counts what does not."""

    found: list[Filtered] = field(default_factory=list)

    def sift(self, name: str, of: str, setting: Any, items: Sequence[Item], keep: Callable[[Item], bool]) -> list[Item]:
        """The items that `keep` says yes to."""
        kept = [item for item in items if keep(item)]
        given, dropped = len(items), len(items) - len(kept)
        self.found.append(Filtered(filter=name, of=of, setting=setting, given=given, dropped=dropped))
        return kept


@dataclass(frozen=True)
class Chosen:
    """What becomes rows, by split, with what the filters did."""

    planner_sft: Mapping[Split, Sequence[Story]]
    critic_sft: Mapping[Split, Sequence[Example]]
    critic_rl: Mapping[Split, Sequence[Example]]
    filters: tuple[Filtered, ...]
    notes: tuple[str, ...]


def choose(stories: Sequence[Story], filters: FiltersConfig, seed: int) -> Chosen:
    """The rows' stories and attempts, in the order of the stories; equal input gives equal output."""
    sieve, notes = Sieve(), list[str]()
    examples = [Example(story, attempt) for story in stories for attempt in story.judged()]
    examples = _good_steps(examples, filters, sieve)
    if filters.dedupe:
        examples = sieve.sift("dedupe", "critic", True, examples, _first(lambda example: example.question))
    supervised, reinforced = _by_variance(examples, filters, seed, sieve)
    split = _splitter(filters.val, seed)
    sft = _balanced("critic_sft", _split(supervised, lambda e: split(e.story)), filters, seed, sieve, notes)
    rl = _balanced("critic_rl", _split(reinforced, lambda e: split(e.story)), filters, seed, sieve, notes)
    plans = _plans(stories, filters, sieve)
    return Chosen(_split(plans, split), sft, rl, tuple(sieve.found), tuple(notes))


# --- plans -----------------------------------------------------------------------------------------------------------


def _plans(stories: Sequence[Story], filters: FiltersConfig, sieve: Sieve) -> list[Story]:
    def is_good(story: Story) -> bool:
        if filters.planner == "accepted" and not all(a.verdict for a in story.chosen().values()):
            return False
        return filters.planner == "plan" or story.trajectory.status == "complete"

    planned = sieve.sift(
        "plan", "planner", None, stories, lambda s: s.trajectory.planner is not None and s.trajectory.plan is not None
    )
    kept = sieve.sift("planner", "planner", filters.planner, planned, is_good)
    if filters.dedupe:
        kept = sieve.sift("dedupe", "planner", True, kept, _first(lambda story: _asked(story.trajectory.request)))
    return kept


def _asked(request: Request) -> Hashable:
    return request.text, request.image_ids


def _first(key: Callable[[Item], Hashable]) -> Callable[[Item], bool]:
    """Whether an item is the first of its key."""
    seen: set[Hashable] = set()

    def is_first(item: Item) -> bool:
        known = key(item) in seen
        seen.add(key(item))
        return not known

    return is_first


# --- steps -----------------------------------------------------------------------------------------------------------


def _scores(examples: Iterable[Example]) -> dict[tuple[str, int], list[float]]:
    """The scores of each step that has any, in the order of its attempts."""
    steps: dict[tuple[str, int], list[float]] = defaultdict(list)
    for example in examples:
        if example.score is not None:
            steps[example.step].append(example.score)
    return steps


def _good_steps(examples: list[Example], filters: FiltersConfig, sieve: Sieve) -> list[Example]:
    """Without the steps whose score falls or stays low; steps without any score pass."""
    steps = _scores(examples)
    if (fall := filters.degrading) is not None:
        bad = {step for step, scores in steps.items() if scores[-1] < scores[0] - fall}
        examples = sieve.sift("degrading", "critic", fall, examples, lambda e: e.step not in bad)
    if (floor := filters.low) is not None:
        worst = {step for step, scores in steps.items() if max(scores) < floor}
        examples = sieve.sift("low", "critic", floor, examples, lambda e: e.step not in worst)
    return examples


def _by_variance(
    examples: Sequence[Example], filters: FiltersConfig, seed: int, sieve: Sieve
) -> tuple[list[Example], list[Example]]:
    """The examples for supervision and for reinforcement; of steps that vary alike chance decides."""
    spread = {step: float(np.var(scores)) for step, scores in _scores(examples).items()}
    order = sorted(spread, key=lambda step: (-spread[step], stream_key(seed, f"rl/{step[0]}", step[1])))
    share = filters.rl_share
    varied = set(order if share is None else order[: round(share * len(order))])
    sft = [example for example in examples if share is None or example.step not in varied]
    rl = [example for example in examples if share is None or example.step in varied]
    sft = sieve.sift("no_new_prompt", "critic_sft", None, sft, _teaches)
    return sft, sieve.sift("unscored", "critic_rl", None, rl, lambda example: example.score is not None)


def _teaches(example: Example) -> bool:
    return example.success or bool((example.attempt.refined_prompt or "").strip())


# --- splits and balance ----------------------------------------------------------------------------------------------


def _splitter(share: float, seed: int) -> Callable[[Story], Split]:
    """Where a story goes, by its request alone: more stories move none, and equal requests stay together."""

    def split(story: Story) -> Split:
        drawn = stream_key(seed, f"val/{_asked(story.trajectory.request)!r}") / 2**128
        return "val" if drawn < share else "train"

    return split


def _split(items: Iterable[Item], split: Callable[[Item], Split]) -> dict[Split, list[Item]]:
    parts: dict[Split, list[Item]] = {name: [] for name in SPLITS}
    for item in items:
        parts[split(item)].append(item)
    return parts


def _balanced(
    name: SetName,
    parts: Mapping[Split, Sequence[Example]],
    filters: FiltersConfig,
    seed: int,
    sieve: Sieve,
    notes: list[str],
) -> Mapping[Split, Sequence[Example]]:
    """Each split with the commoner verdict thinned by chance; one that knows one verdict only stays as it is."""
    if filters.balance is None:
        return parts
    balanced: dict[Split, Sequence[Example]] = {}
    for split, examples in parts.items():
        file = file_name(name, split)
        if len({example.success for example in examples}) == 1:
            what = "success" if examples[0].success else "failure"
            notes.append(f"{file}: every verdict is {what}, so it is not balanced")
        is_kept = _evened(examples, filters.balance, seed)
        balanced[split] = sieve.sift("balance", file, filters.balance, examples, is_kept)
    return balanced


def _evened(examples: Sequence[Example], ratio: float, seed: int) -> Callable[[Example], bool]:
    """Says yes to all examples of the rarer verdict and to `ratio` times as many of the other, drawn by chance."""
    verdicts = Counter(example.success for example in examples)
    common = verdicts[True] > verdicts[False]
    room = int(ratio * verdicts[not common]) if len(verdicts) == 2 else len(examples)

    def drawn(example: Example) -> int:
        return stream_key(seed, f"balance/{example.step[0]}", example.step[1], example.attempt.attempt)

    spare = {id(e) for e in sorted((e for e in examples if e.success == common), key=drawn)[room:]}
    return lambda example: id(example) not in spare
