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
from interleave.agents.prompts import TemplateRef
from interleave.datasets.config import FiltersConfig
from interleave.datasets.rows import FinishedStory, before_and_after
from interleave.records import Attempt, Record

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
    templates: Mapping[str, TemplateRef] = Field(default_factory=dict)
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
    def has_target(self) -> bool:
        """Whether there is a verdict to learn: a failure needs a new prompt."""
        return self.success or bool((self.attempt.refined_prompt or "").strip())

    @property
    def question(self) -> Hashable:
        """What the critic is asked about it: images and prompts."""
        return *before_and_after(self.attempt), self.attempt.original_prompt, self.attempt.drawn_prompt

    @property
    def score(self) -> float | None:
        """sqrt(semantics * quality) in [0, 10]; None where the judge did not score it."""
        return self.attempt.scores.overall if self.attempt.scores else None


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
    return _RowSelector(filters, seed).select(stories)


@dataclass
class _RowSelector:
    """Applies filters and keeps a record of each."""

    filters: FiltersConfig
    seed: int
    entries: list[FilterEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def select(self, stories: Sequence[FinishedStory]) -> SelectedRows:
        examples = [JudgedAttempt(story, attempt) for story in stories for attempt in story.judged_attempts()]
        examples = self._drop_bad_steps(examples)
        if self.filters.dedupe:
            examples = self._apply("dedupe", "critic", True, examples, _is_first(lambda example: example.question))
        supervised, reinforced = self._split_by_variance(examples)
        sft, rl = self._balance("critic_sft", supervised), self._balance("critic_rl", reinforced)
        plans = self._group_by_split(self._select_plans(stories), lambda story: story)
        return SelectedRows(plans, sft, rl, tuple(self.entries), tuple(self.notes))

    def _apply(
        self, name: str, of: str, setting: Any, items: Sequence[Item], keep: Callable[[Item], bool]
    ) -> list[Item]:
        """The items for which `keep` is true."""
        kept = [item for item in items if keep(item)]
        given, dropped = len(items), len(items) - len(kept)
        self.entries.append(FilterEntry(filter=name, of=of, setting=setting, given=given, dropped=dropped))
        return kept

    def _select_plans(self, stories: Sequence[FinishedStory]) -> list[FinishedStory]:
        rule = self.filters.planner

        def is_good(story: FinishedStory) -> bool:
            if rule == "accepted" and not all(a.verdict for a in story.selected_attempts().values()):
                return False
            return rule == "plan" or story.trajectory.is_whole

        def is_planned(story: FinishedStory) -> bool:
            return story.trajectory.planner is not None and story.trajectory.plan is not None

        kept = self._apply("plan", "planner", None, stories, is_planned)
        kept = self._apply("planner", "planner", rule, kept, is_good)
        return self._apply("dedupe", "planner", True, kept, _is_first(_request_key)) if self.filters.dedupe else kept

    def _drop_bad_steps(self, examples: list[JudgedAttempt]) -> list[JudgedAttempt]:
        """Drops the steps whose score falls or stays low; steps without any score are kept."""
        steps = _step_scores(examples)
        if (fall := self.filters.degrading) is not None:
            bad = {step for step, scores in steps.items() if scores[-1] < scores[0] - fall}
            examples = self._apply("degrading", "critic", fall, examples, lambda e: e.step not in bad)
        if (floor := self.filters.low) is not None:
            worst = {step for step, scores in steps.items() if max(scores) < floor}
            examples = self._apply("low", "critic", floor, examples, lambda e: e.step not in worst)
        return examples

    def _split_by_variance(self, examples: Sequence[JudgedAttempt]) -> tuple[list[JudgedAttempt], list[JudgedAttempt]]:
        """Examples for supervised and for reinforcement learning; chance decides between steps of equal variance."""
        spread = {step: float(np.var(scores)) for step, scores in _step_scores(examples).items()}
        order = sorted(spread, key=lambda step: (-spread[step], stream_key(self.seed, f"rl/{step[0]}", step[1])))
        share = self.filters.rl_share
        varied = set(order if share is None else order[: round(share * len(order))])
        sft = [example for example in examples if share is None or example.step not in varied]
        rl = [example for example in examples if share is None or example.step in varied]
        sft = self._apply("no_new_prompt", "critic_sft", None, sft, lambda e: e.has_target)
        return sft, self._apply("unscored", "critic_rl", None, rl, lambda e: e.score is not None)

    def _group_by_split(
        self, items: Iterable[Item], story_of: Callable[[Item], FinishedStory]
    ) -> dict[Split, list[Item]]:
        """The request of an item alone decides: further stories move none, and equal requests stay together."""
        parts: dict[Split, list[Item]] = {name: [] for name in SPLITS}
        for item in items:
            value = stream_key(self.seed, f"val/{_request_key(story_of(item))!r}") / 2**128
            parts["val" if value < self.filters.val else "train"].append(item)
        return parts

    def _balance(self, name: SetName, examples: Sequence[JudgedAttempt]) -> Mapping[Split, Sequence[JudgedAttempt]]:
        """Drops rows of the more frequent verdict at random in each split; a split with one verdict stays as it is."""
        parts = self._group_by_split(examples, lambda example: example.story)
        if (ratio := self.filters.balance) is None:
            return parts
        for split, found in parts.items():
            file = file_name(name, split)
            if len({example.success for example in found}) == 1:
                what = "success" if found[0].success else "failure"
                self.notes.append(f"{file}: every verdict is {what}, so it is not balanced")
            parts[split] = self._apply("balance", file, ratio, found, _keep_balanced(found, ratio, self.seed))
        return parts


def _request_key(story: FinishedStory) -> Hashable:
    return story.trajectory.request.text, story.trajectory.request.image_ids


def _is_first(key: Callable[[Item], Hashable]) -> Callable[[Item], bool]:
    """Whether an item is the first of its key."""
    seen: set[Hashable] = set()

    def is_first(item: Item) -> bool:
        known = key(item) in seen
        seen.add(key(item))
        return not known

    return is_first


def _step_scores(examples: Iterable[JudgedAttempt]) -> dict[tuple[str, int], list[float]]:
    """The scores of each step that has any, in the order of its attempts."""
    steps: dict[tuple[str, int], list[float]] = defaultdict(list)
    for example in examples:
        if example.score is not None:
            steps[example.step].append(example.score)
    return steps


def _keep_balanced(examples: Sequence[JudgedAttempt], ratio: float, seed: int) -> Callable[[JudgedAttempt], bool]:
    """Keeps all examples of the rarer verdict, and at random `ratio` times as many of the other."""
    verdicts = Counter(example.success for example in examples)
    common = verdicts[True] > verdicts[False]
    limit = int(ratio * verdicts[not common]) if len(verdicts) == 2 else len(examples)

    def random_order(example: JudgedAttempt) -> int:
        return stream_key(seed, f"balance/{example.step[0]}", example.step[1], example.attempt.attempt)

    dropped = {id(e) for e in sorted((e for e in examples if e.success == common), key=random_order)[limit:]}
    return lambda example: id(example) not in dropped
