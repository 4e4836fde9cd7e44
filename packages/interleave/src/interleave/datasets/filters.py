"""From trajectories to rows: which ones are kept, and to which set they go.

planner_sft  plans                  critic_sft  verdicts to imitate         critic_rl  images to judge, with scores

Source of the filters: InterleaveThinker, arXiv 2606.13679: steps whose score falls or stays low are dropped, those
whose scores vary most go to reinforcement learning, verdicts are balanced.  The paper gives no thresholds; ours are
settings.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field

from imgen_common.streams import stream_key
from interleave.datasets.config import FiltersConfig
from interleave.datasets.rows import FinishedStory, before_and_after
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


class FilterEntry(Record):
    """What one filter did: of the `given` rows of the set `of` it dropped `dropped`."""

    filter: str
    of: str
    setting: Any
    given: int
    dropped: int


class SetInfo(Record):
    """The content of `set.json`, which is written last, so that a folder that has it holds complete sets.

    rows: by set and split.  trajectories, attempts: how many ended how.  unscored: images without a score, by what
    the judge's failure was.  categories: requests by category, whether they became complete or not.
    """

    rows: Mapping[str, Mapping[str, int]]
    source: str
    filters: tuple[FilterEntry, ...] = ()
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
class JudgedAttempt:
    """One judged attempt of a story."""

    story: FinishedStory
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
        """What the critic is asked about it: images and prompts."""
        return *before_and_after(self.attempt), self.attempt.original_prompt, self.attempt.prompt_used

    @property
    def score(self) -> float | None:
        """sqrt(semantics * quality) in [0, 10]; None where the judge did not score it."""
        return self.attempt.scores.overall if self.attempt.scores else None


@dataclass
class FilterLog:
    """Applies filters and keeps a record of each."""

    entries: list[FilterEntry] = field(default_factory=list)

    def apply(
        self, name: str, of: str, setting: Any, items: Sequence[Item], keep: Callable[[Item], bool]
    ) -> list[Item]:
        """The items for which `keep` is true."""
        kept = [item for item in items if keep(item)]
        given, dropped = len(items), len(items) - len(kept)
        self.entries.append(FilterEntry(filter=name, of=of, setting=setting, given=given, dropped=dropped))
        return kept


@dataclass(frozen=True)
class SelectedRows:
    """The stories and attempts that become rows, by split, with what the filters did."""

    planner_sft: Mapping[Split, Sequence[FinishedStory]]
    critic_sft: Mapping[Split, Sequence[JudgedAttempt]]
    critic_rl: Mapping[Split, Sequence[JudgedAttempt]]
    filters: tuple[FilterEntry, ...]
    notes: tuple[str, ...]


def select_rows(stories: Sequence[FinishedStory], filters: FiltersConfig, seed: int) -> SelectedRows:
    """Selects stories and attempts for the rows, in the order of the stories; equal input gives equal output."""
    log, notes = FilterLog(), list[str]()
    examples = [JudgedAttempt(story, attempt) for story in stories for attempt in story.judged_attempts()]
    examples = _drop_bad_steps(examples, filters, log)
    if filters.dedupe:
        examples = log.apply("dedupe", "critic", True, examples, _is_first(lambda example: example.question))
    supervised, reinforced = _split_by_variance(examples, filters, seed, log)
    split = _make_splitter(filters.val, seed)
    sft = _balance("critic_sft", _group_by_split(supervised, lambda e: split(e.story)), filters, seed, log, notes)
    rl = _balance("critic_rl", _group_by_split(reinforced, lambda e: split(e.story)), filters, seed, log, notes)
    plans = _select_plans(stories, filters, log)
    return SelectedRows(_group_by_split(plans, split), sft, rl, tuple(log.entries), tuple(notes))


# --- plans -----------------------------------------------------------------------------------------------------------


def _select_plans(stories: Sequence[FinishedStory], filters: FiltersConfig, log: FilterLog) -> list[FinishedStory]:
    def is_good(story: FinishedStory) -> bool:
        if filters.planner == "accepted" and not all(a.verdict for a in story.selected_attempts().values()):
            return False
        return filters.planner == "plan" or story.trajectory.status == "complete"

    planned = log.apply(
        "plan", "planner", None, stories, lambda s: s.trajectory.planner is not None and s.trajectory.plan is not None
    )
    kept = log.apply("planner", "planner", filters.planner, planned, is_good)
    if filters.dedupe:
        kept = log.apply(
            "dedupe", "planner", True, kept, _is_first(lambda story: _request_key(story.trajectory.request))
        )
    return kept


def _request_key(request: Request) -> Hashable:
    return request.text, request.image_ids


def _is_first(key: Callable[[Item], Hashable]) -> Callable[[Item], bool]:
    """Whether an item is the first of its key."""
    seen: set[Hashable] = set()

    def is_first(item: Item) -> bool:
        known = key(item) in seen
        seen.add(key(item))
        return not known

    return is_first


# --- steps -----------------------------------------------------------------------------------------------------------


def _step_scores(examples: Iterable[JudgedAttempt]) -> dict[tuple[str, int], list[float]]:
    """The scores of each step that has any, in the order of its attempts."""
    steps: dict[tuple[str, int], list[float]] = defaultdict(list)
    for example in examples:
        if example.score is not None:
            steps[example.step].append(example.score)
    return steps


def _drop_bad_steps(examples: list[JudgedAttempt], filters: FiltersConfig, log: FilterLog) -> list[JudgedAttempt]:
    """Drops the steps whose score falls or stays low; steps without any score are kept."""
    steps = _step_scores(examples)
    if (fall := filters.degrading) is not None:
        bad = {step for step, scores in steps.items() if scores[-1] < scores[0] - fall}
        examples = log.apply("degrading", "critic", fall, examples, lambda e: e.step not in bad)
    if (floor := filters.low) is not None:
        worst = {step for step, scores in steps.items() if max(scores) < floor}
        examples = log.apply("low", "critic", floor, examples, lambda e: e.step not in worst)
    return examples


def _split_by_variance(
    examples: Sequence[JudgedAttempt], filters: FiltersConfig, seed: int, log: FilterLog
) -> tuple[list[JudgedAttempt], list[JudgedAttempt]]:
    """The examples for supervised and for reinforcement learning; between steps of equal variance chance decides."""
    spread = {step: float(np.var(scores)) for step, scores in _step_scores(examples).items()}
    order = sorted(spread, key=lambda step: (-spread[step], stream_key(seed, f"rl/{step[0]}", step[1])))
    share = filters.rl_share
    varied = set(order if share is None else order[: round(share * len(order))])
    sft = [example for example in examples if share is None or example.step not in varied]
    rl = [example for example in examples if share is None or example.step in varied]
    sft = log.apply(
        "no_new_prompt", "critic_sft", None, sft, lambda e: e.success or bool((e.attempt.refined_prompt or "").strip())
    )
    return sft, log.apply("unscored", "critic_rl", None, rl, lambda example: example.score is not None)


# --- splits and balance ----------------------------------------------------------------------------------------------


def _make_splitter(share: float, seed: int) -> Callable[[FinishedStory], Split]:
    """Decides about a story by its request alone: further stories move none, and equal requests stay together."""

    def split(story: FinishedStory) -> Split:
        value = stream_key(seed, f"val/{_request_key(story.trajectory.request)!r}") / 2**128
        return "val" if value < share else "train"

    return split


def _group_by_split(items: Iterable[Item], split: Callable[[Item], Split]) -> dict[Split, list[Item]]:
    parts: dict[Split, list[Item]] = {name: [] for name in SPLITS}
    for item in items:
        parts[split(item)].append(item)
    return parts


def _balance(
    name: SetName,
    parts: Mapping[Split, Sequence[JudgedAttempt]],
    filters: FiltersConfig,
    seed: int,
    log: FilterLog,
    notes: list[str],
) -> Mapping[Split, Sequence[JudgedAttempt]]:
    """Drops rows of the more frequent verdict at random in each split; a split with one verdict stays as it is."""
    if filters.balance is None:
        return parts
    balanced: dict[Split, Sequence[JudgedAttempt]] = {}
    for split, examples in parts.items():
        file = file_name(name, split)
        if len({example.success for example in examples}) == 1:
            what = "success" if examples[0].success else "failure"
            notes.append(f"{file}: every verdict is {what}, so it is not balanced")
        is_kept = _keep_balanced(examples, filters.balance, seed)
        balanced[split] = log.apply("balance", file, filters.balance, examples, is_kept)
    return balanced


def _keep_balanced(examples: Sequence[JudgedAttempt], ratio: float, seed: int) -> Callable[[JudgedAttempt], bool]:
    """Keeps all examples of the rarer verdict, and at random `ratio` times as many of the other."""
    verdicts = Counter(example.success for example in examples)
    common = verdicts[True] > verdicts[False]
    limit = int(ratio * verdicts[not common]) if len(verdicts) == 2 else len(examples)

    def random_order(example: JudgedAttempt) -> int:
        return stream_key(seed, f"balance/{example.step[0]}", example.step[1], example.attempt.attempt)

    dropped = {id(e) for e in sorted((e for e in examples if e.success == common), key=random_order)[limit:]}
    return lambda example: id(example) not in dropped
