"""The loop with scripted parts: what is drawn from what, who is asked what, when it stops, what is on record."""

import asyncio
import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import virtual_time
from backends import FakeCritic, FakeGenerator, FakeJudge, FakePlanner, picture_of, plan_of, repeated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imgen_common.errors import UserError
from interleave.agents.critic import ChatCritic, RandomRewrite
from interleave.agents.planner import ChatPlanner
from interleave.agents.prompts import load_template
from interleave.datasets.rows import make_rl_row
from interleave.loop.attempts import select_attempt
from interleave.loop.config import LoopConfig
from interleave.loop.engine import Engine
from interleave.models.chat.scripted import ScriptedChat
from interleave.protocols import BackendError, Components, CriticInput, GenerationRequest, HashedImage, Reply
from interleave.records import Attempt, Plan, Record, Request, Scores, Trajectory
from interleave.storage.images import ImageStore
from interleave.storage.trace import Trace, read_trace

TIMES = {"timings", "spent"}


def ask(name: str = "a", text: str = "a story") -> Request:
    return Request(id=name, text=text)


def parts(
    plan: Plan | None = None,
    verdict: Callable[[CriticInput, int], Any] = lambda shown, seed: (True, shown.prompt_used),
    generator: FakeGenerator | None = None,
    **kwargs: Any,
) -> Components:
    planner = FakePlanner(lambda request, seed: plan or plan_of("one", "two"))
    return Components(planner, FakeCritic(verdict), generator or FakeGenerator(), **kwargs)


def run(
    folder: Path,
    made: Components,
    requests: Sequence[Request] = (ask(),),
    loop: LoopConfig | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
    run_loop: Callable[..., Any] = asyncio.run,
    **kwargs: Any,
) -> list[Trajectory]:
    folder.mkdir(parents=True, exist_ok=True)
    with Trace(folder) as trace:
        engine = Engine(made, loop or LoopConfig(), 0, trace, ImageStore(folder / "images"), on_record, **kwargs)
        return run_loop(engine.run_all(requests))


def attempts(folder: Path, name: str = "a") -> list[Attempt]:
    return [a for _, a in sorted(read_trace(folder)[name].attempts.items())]


def without_times(folder: Path) -> dict[str, Any]:
    """All records, without what depends on the clock."""
    out = {}
    for name, recorded in read_trace(folder).items():
        kept = [recorded.plan, recorded.trajectory, *(a for _, a in sorted(recorded.attempts.items()))]
        out[name] = [record and record.model_dump(mode="json", exclude=TIMES) for record in kept]
        spent = recorded.trajectory.spent if recorded.trajectory else None
        out[name].append(spent and spent.model_dump(exclude={"seconds"}))
    return out


# --- one story -------------------------------------------------------------------------------------------------------


def test_a_story_is_drawn_then_edited(tmp_path: Path) -> None:
    made = parts(plan_of("one", None, "three"))
    (trajectory,) = run(tmp_path, made)
    first, second = made.generator.jobs
    assert trajectory.status == "complete"
    assert trajectory.selected == {1: 1, 3: 1}
    assert first.sources == ()
    assert [source.id for source in second.sources] == [HashedImage.from_pil(picture_of(first)).id]
    looks = made.critic.looks
    assert looks[0].before.image.getpixel((0, 0)) == (255, 255, 255)
    assert looks[0].before.image.size == looks[0].after.image.size
    assert looks[1].before.id == looks[0].after.id
    assert [look.is_edit for look in looks[:2]] == [False, True]
    assert [words for words, _ in looks[1].story] == ["one", "words 2"]
    assert [a.op for a in attempts(tmp_path)] == ["t2i", "edit"]


def test_a_users_image_is_edited_from_the_first_step(tmp_path: Path) -> None:
    given = [
        ImageStore(tmp_path / "images").put(HashedImage.from_pil(Image.new("RGB", (4, 4), c))) for c in ("red", "blue")
    ]
    made = parts()
    run(tmp_path, made, [Request(id="a", text="x", image_ids=tuple(given))])
    assert [source.id for source in made.generator.jobs[0].sources] == [given[-1]]
    assert made.critic.looks[0].before.id == given[-1]
    assert made.critic.looks[0].is_edit


def test_all_references_up_to_what_the_generator_takes(tmp_path: Path) -> None:
    made = parts(plan_of("one", "two", "three", "four"), generator=FakeGenerator(max_sources=2))
    run(tmp_path, made, loop=LoopConfig(references="all"))
    assert [len(job.sources) for job in made.generator.jobs] == [0, 1, 2, 2]
    assert made.generator.jobs[3].sources[-1].id == made.critic.looks[2].after.id


def test_without_a_planner_the_request_is_the_prompt(tmp_path: Path) -> None:
    made = Components(None, None, FakeGenerator())
    (trajectory,) = run(tmp_path, made, [ask(text="all at once")])
    assert [job.prompt for job in made.generator.jobs] == ["all at once"]
    assert attempts(tmp_path)[0].status == "unjudged"
    assert trajectory.planner is None


def test_a_rejected_image_is_drawn_again_from_the_same_source(tmp_path: Path) -> None:
    made = parts(plan_of("one", "two"), lambda shown, seed: (shown.prompt_used == "better", "better"))
    run(tmp_path, made)
    used = [(a.step, a.attempt, a.prompt_used, a.status) for a in attempts(tmp_path)]
    assert used == [
        (1, 1, "one", "rejected"),
        (1, 2, "better", "accepted"),
        (2, 1, "two", "rejected"),
        (2, 2, "better", "accepted"),
    ]
    third, fourth = attempts(tmp_path)[2:]
    assert third.source_ids == fourth.source_ids == (attempts(tmp_path)[1].image_id,)
    assert third.seed != fourth.seed
    assert all(a.original_prompt == ("one", "two")[a.step - 1] for a in attempts(tmp_path))


def test_best_of_n_keeps_the_prompt_and_takes_the_best(tmp_path: Path) -> None:
    critic = FakeCritic(
        lambda shown, seed: (False, "other"), probability=lambda shown: int(shown.after.id[:4], 16) / 65536
    )
    made = Components(FakePlanner(lambda r, s: plan_of("one")), critic, FakeGenerator())
    loop = LoopConfig(max_attempts=5, stop_on_success=False, rewrite=False, select="best_by_verdict_probability")
    (trajectory,) = run(tmp_path, made, loop=loop)
    drawn = attempts(tmp_path)
    assert {a.prompt_used for a in drawn} == {"one"}
    best = max(drawn, key=lambda a: a.success_probability or 0)
    assert trajectory.selected == {1: best.attempt}


def test_the_judge_chooses(tmp_path: Path) -> None:
    judge = FakeJudge(lambda shown: int(shown.after.id[0], 16) / 1.6)
    made = parts(plan_of("one"), lambda shown, seed: (False, "more"), judge=judge)
    (trajectory,) = run(tmp_path, made, loop=LoopConfig(max_attempts=4, select="best_by_judge"))
    scores = {a.attempt: a.scores.semantics for a in attempts(tmp_path) if a.scores}
    assert len(scores) == 4
    assert scores[trajectory.selected[1]] == max(scores.values())


def test_lost_scores_are_asked_for_again_and_nothing_else(tmp_path: Path) -> None:
    judge = FakeJudge(lambda shown: 5.0)
    made = parts(plan_of("one", "two"), lambda shown, seed: (seed % 2 == 0, "more"), judge=judge)
    loop = LoopConfig(max_attempts=3, stop_on_success=False, select="best_by_judge")

    def outage(shown: CriticInput) -> float:
        raise BackendError("unreachable", "nobody is there")

    judge.score_of = outage
    (trajectory,) = run(tmp_path, made, loop=loop)
    before, num_jobs, num_looks = attempts(tmp_path), len(made.generator.jobs), len(made.critic.looks)
    assert all(a.error and a.scores is None for a in before)
    assert run(tmp_path, made, loop=loop, retry_failed=True) == [trajectory]
    assert attempts(tmp_path) == before
    judge.score_of = lambda shown: int(shown.after.id[0], 16) / 1.6
    assert run(tmp_path, made, loop=loop) == [trajectory]
    assert attempts(tmp_path) == before
    ImageStore(tmp_path / "images").path(str(before[-1].image_id)).unlink()
    assert run(tmp_path, made, loop=loop, retry_failed=True) == [trajectory]
    assert (len(made.generator.jobs), len(made.critic.looks)) == (num_jobs, num_looks)
    after = attempts(tmp_path)
    assert [a.scores is not None for a in after] == [True] * 5 + [False]
    assert [a.error for a in after[:5]] == [None] * 5
    assert [a.image_id for a in after] == [a.image_id for a in before]
    assert not read_trace(tmp_path)["a"].replaced


def test_a_selection_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a judge"):
        run(tmp_path, parts(), loop=LoopConfig(select="best_by_judge"))
    with pytest.raises(UserError, match="needs a critic"):
        run(tmp_path, Components(None, None, FakeGenerator()), loop=LoopConfig(select="best_by_verdict_probability"))


# --- any story -------------------------------------------------------------------------------------------------------

VERDICTS = st.lists(st.sampled_from(["yes", "no", "same", "unreadable"]), min_size=1, max_size=8)
PROMPTS = st.lists(st.one_of(st.none(), st.sampled_from(["p", "q", "r"])), min_size=1, max_size=5)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=PROMPTS,
    verdicts=VERDICTS,
    tries=st.integers(1, 4),
    limit=st.one_of(st.none(), st.integers(1, 6)),
    fails=st.sets(st.integers(0, 12), max_size=4),
    rule=st.sampled_from(["last", "first_success", "best_by_verdict_probability"]),
    stop=st.booleans(),
)
def test_the_laws_of_the_loop(
    tmp_path_factory: pytest.TempPathFactory,
    prompts: list[str | None],
    verdicts: list[str],
    tries: int,
    limit: int | None,
    fails: set[int],
    rule: Any,
    stop: bool,
) -> None:
    folder = tmp_path_factory.mktemp("loop")
    said: list[str] = []

    def verdict(shown: CriticInput, seed: int) -> tuple[bool, str] | str:
        said.append(verdicts[len(said) % len(verdicts)])
        return {"yes": (True, shown.prompt_used), "no": (False, shown.prompt_used + "!"), "same": (False, "p")}.get(
            said[-1], "?"
        )

    generator = FakeGenerator()
    generator.fails = lambda job: BackendError("rate_limited", "busy") if len(generator.jobs) in fails else None
    made = parts(plan_of(*prompts), verdict, generator)
    loop = LoopConfig(max_attempts=tries, max_generations=limit, select=rule, critic_tries=2, stop_on_success=stop)
    (trajectory,) = run(folder, made, loop=loop)

    drawn = attempts(folder)
    by_step = {s: [a for a in drawn if a.step == s] for s in {a.step for a in drawn}}
    assert len(generator.jobs) == len(drawn) <= sum(p is not None for p in prompts) * tries
    assert not repeated(generator.jobs)
    assert len(drawn) <= (limit if limit is not None else len(drawn))
    chosen = {s: next(a for a in by_step[s] if a.attempt == k).image_id for s, k in trajectory.selected.items()}
    image_before: str | None = None
    for step in sorted(by_step):
        for number, attempt in enumerate(by_step[step], 1):
            assert attempt.attempt == number
            assert attempt.source_ids == (() if image_before is None else (image_before,))
            assert (attempt.op == "t2i") == (image_before is None)
            if attempt.status == "accepted" and stop:
                assert number == len(by_step[step])
        image_before = chosen.get(step, image_before)
        if any(a.status == "accepted" for a in by_step[step]):
            assert next(a for a in by_step[step] if a.image_id == chosen[step]).status == "accepted"
    if trajectory.is_whole:
        judged_well = {s for s, k in trajectory.selected.items() if by_step[s][k - 1].status == "accepted"}
        assert (trajectory.status == "complete") == (judged_well == set(chosen))
        assert set(chosen) == {i for i, p in enumerate(prompts, 1) if p is not None}
    elif trajectory.status == "generator_failed":
        assert by_step[max(by_step)][-1].status == "generator_failed"
        assert not (stop and any(a.status == "accepted" for a in by_step[max(by_step)]))
    else:
        assert trajectory.status == "budget_exhausted"
        assert len(drawn) == limit
    assert trajectory.spent.generations == len(drawn)
    assert trajectory.spent.critic_calls == len(made.critic.looks) == len(said)


@pytest.mark.parametrize("kind", ["malformed_response", "timeout", "server_error", "unreachable"])
def test_images_that_fail_are_not_paid_for_time_and_again(kind: Any, tmp_path: Path) -> None:
    generator = FakeGenerator()
    generator.fails = lambda job: BackendError(kind, "no image")
    (story,) = run(tmp_path, parts(generator=generator), loop=LoopConfig(max_attempts=8))
    assert (story.status, len(generator.jobs)) == ("generator_failed", 2)
    assert story.error == f"step 1: {kind}: no image"


@pytest.mark.parametrize("kind", ["denied", "unreachable", "rate_limited", "server_error", "timeout"])
@pytest.mark.parametrize("prompts", [["one"], ["one", "two"]])
def test_an_outage_does_not_make_a_rejected_image_that_of_the_story(
    kind: Any, prompts: list[str], tmp_path: Path
) -> None:
    """The critic is not said to have rejected what was never drawn, and the story can be tried again."""
    generator, rejecting = FakeGenerator(), lambda shown, seed: (False, "another")
    generator.fails = lambda job: BackendError(kind, "down") if len(generator.jobs) in (2, 3) else None
    (story,) = run(tmp_path, parts(plan_of(*prompts), rejecting, generator), loop=LoopConfig(max_attempts=4))
    assert (story.status, story.error, story.selected) == ("generator_failed", f"step 1: {kind}: down", {1: 1})
    good = parts(plan_of(*prompts))
    (story,) = run(tmp_path, good, loop=LoopConfig(max_attempts=4), retry_failed=True)
    assert story.status == "complete"
    assert [job.prompt for job in good.generator.jobs] == ["another", *prompts[1:]]


def test_the_best_of_fewer_images_than_asked_for_is_not_taken_in_an_outage(tmp_path: Path) -> None:
    generator, loop = FakeGenerator(), LoopConfig(max_attempts=4, stop_on_success=False)
    generator.fails = lambda job: BackendError("unreachable", "down") if len(generator.jobs) in (2, 3) else None
    assert run(tmp_path, parts(plan_of("one"), generator=generator), loop=loop)[0].status == "generator_failed"
    good = parts(plan_of("one"))
    assert run(tmp_path, good, loop=loop, retry_failed=True)[0].status == "complete"
    assert len(good.generator.jobs) == 3


def test_a_rejected_image_stays_where_the_next_prompt_is_refused(tmp_path: Path) -> None:
    generator, rejecting = FakeGenerator(), lambda shown, seed: (False, "another")
    generator.fails = lambda job: BackendError("refused", "a filter") if job.prompt == "another" else None
    (story,) = run(tmp_path, parts(plan_of("one"), rejecting, generator), loop=LoopConfig(max_attempts=4))
    assert (story.status, story.selected) == ("steps_not_accepted", {1: 1})


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("kind", ["server_error", "timeout"])
def test_images_that_failed_count_as_asked_for(limit: int, kind: Any, tmp_path: Path) -> None:
    generator, rejecting = FakeGenerator(), lambda shown, seed: (False, "another")
    generator.fails = lambda job: BackendError(kind, "broke") if len(generator.jobs) % 2 == limit % 2 else None
    made = parts(verdict=rejecting, generator=generator)
    (story,) = run(tmp_path, made, loop=LoopConfig(max_attempts=8, max_generations=limit))
    assert len(generator.jobs) == story.spent.generations == limit
    assert story.status == "budget_exhausted"
    assert story.error == (
        f"{limit} images were asked for, as many as loop.max_generations allows (the last failed: {kind}: broke)"
    )


def test_what_a_generator_drew_instead_is_on_record_and_shown_to_the_critic(tmp_path: Path) -> None:
    class Reviser(FakeGenerator):
        async def generate(self, request: GenerationRequest) -> HashedImage:
            return replace(await super().generate(request), revised_prompt=f"{request.prompt}, in oil")

    made = parts(plan_of("one"), lambda shown, seed: (shown.prompt_used == "better, in oil", "better"), Reviser())
    run(tmp_path, made)
    recorded = attempts(tmp_path)
    assert [(a.prompt_used, a.revised_prompt, a.status) for a in recorded] == [
        ("one", "one, in oil", "rejected"),
        ("better", "better, in oil", "accepted"),
    ]
    row = make_rl_row(recorded[0].model_copy(update={"scores": Scores(semantics=1, quality=1, judge_id="j")}))
    assert row is not None
    assert row.prompt_used == "one, in oil"


def test_why_answers_ended_is_on_record(tmp_path: Path) -> None:
    planner, critic = (
        ScriptedChat(lambda m, s: Reply("?", finish_reason="tool_calls")),
        ScriptedChat(lambda m, s: Reply("?", finish_reason="length", truncated=True)),
    )
    text, images = load_template("planner_text"), load_template("planner_images")
    (story,) = run(tmp_path / "p", Components(ChatPlanner(planner, text, images), None, FakeGenerator()))
    assert story.planner is not None
    assert (story.planner.finish_reason, story.planner.error) == (
        "tool_calls",
        "ended by tool_calls: no <think>: it said '?'",
    )
    made = Components(
        FakePlanner(lambda r, s: plan_of("one")), ChatCritic(critic, load_template("critic")), FakeGenerator()
    )
    run(tmp_path / "c", made, loop=LoopConfig(max_attempts=1))
    (attempt,) = attempts(tmp_path / "c")
    assert (attempt.finish_reason, attempt.error) == (
        "length",
        "cut off after 0 tokens: no <think>: it said '?'; allow a longer answer (max_new_tokens, or "
        "max_completion_tokens in extra), or have the model think less",
    )


@given(statuses=st.lists(st.sampled_from(["accepted", "rejected", "generator_failed"]), min_size=1, max_size=6))
def test_selection(statuses: list[Any]) -> None:
    tried = [
        Attempt.model_construct(attempt=i, status=s, image_id=None if s == "generator_failed" else str(i), scores=None)
        for i, s in enumerate(statuses, 1)
    ]
    drawn = [a for a in tried if a.image_id]
    good = [a for a in drawn if a.status == "accepted"]
    assert select_attempt("last", tried) == ((good or drawn or [None])[-1])
    assert select_attempt("first_success", tried) == (good[0] if good else (drawn or [None])[-1])
    assert (select_attempt("best_by_judge", tried) is None) == (not drawn)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_planner_that_never_parses(tmp_path: Path) -> None:
    planner = FakePlanner(lambda request, seed: "mumble")
    (trajectory,) = run(tmp_path, Components(planner, None, FakeGenerator()), loop=LoopConfig(planner_tries=3))
    assert (trajectory.status, trajectory.error, planner.calls) == ("planner_failed", "unreadable", 3)
    assert trajectory.planner
    assert trajectory.planner.raw == "mumble"


def test_a_plan_of_500_steps_is_asked_for_again(tmp_path: Path) -> None:
    plans = iter([plan_of(*["x"] * 500), plan_of("one")])
    planner = FakePlanner(lambda request, seed: next(plans))
    (trajectory,) = run(tmp_path, Components(planner, None, FakeGenerator()))
    assert trajectory.status == "complete"
    long = FakePlanner(lambda request, seed: plan_of(*["x"] * 500))
    (trajectory,) = run(tmp_path / "b", Components(long, None, FakeGenerator()))
    assert trajectory.status == "planner_failed"
    assert "500 steps; at most 16" in (trajectory.error or "")


def test_a_planner_that_cannot_be_reached_is_asked_once(tmp_path: Path) -> None:
    planner = FakePlanner(lambda request, seed: BackendError("unreachable", "no route"))
    (trajectory,) = run(tmp_path, Components(planner, None, FakeGenerator()))
    assert trajectory.error == "unreachable: no route"
    assert planner.calls == 1


def test_an_unreadable_critic_costs_a_new_seed_not_a_repetition(tmp_path: Path) -> None:
    made = parts(plan_of("one"), lambda shown, seed: "mumble")
    (trajectory,) = run(tmp_path, made, loop=LoopConfig(max_attempts=3, critic_tries=2))
    assert [a.status for a in attempts(tmp_path)] == ["critic_unparsable"] * 3
    assert len(made.critic.looks) == 6
    assert len({job.seed for job in made.generator.jobs}) == 3
    assert (trajectory.status, trajectory.is_whole) == ("steps_not_accepted", True)


@pytest.mark.parametrize(
    ("rejected", "error"),
    [
        ((), None),
        ((2,), "the critic accepted no image of step 2"),
        ((1, 3), "the critic accepted no image of steps 1, 3"),
    ],
)
def test_a_story_with_steps_that_were_never_accepted_is_not_complete(
    tmp_path: Path, rejected: tuple[int, ...], error: str | None
) -> None:
    prompts = ["one", "two", "three"]
    wrong = {prompts[step - 1] for step in rejected}
    made = parts(plan_of(*prompts), lambda shown, seed: (shown.original_prompt not in wrong, "again"))
    (trajectory,) = run(tmp_path, made, loop=LoopConfig(max_attempts=2))
    assert (trajectory.status, trajectory.error) == ("steps_not_accepted" if rejected else "complete", error)
    assert set(trajectory.selected) == {1, 2, 3}
    assert run(tmp_path, made, retry_failed=True) == [trajectory]  # nothing failed, so there is nothing to try again


def test_a_critic_that_nobody_can_read_is_not_said_to_have_rejected(tmp_path: Path) -> None:
    (story,) = run(tmp_path, parts(verdict=lambda shown, seed: "mumble"), loop=LoopConfig(max_attempts=2))
    said = "no answer of the critic on steps 1, 2 could be read (the last: unreadable)"
    assert (story.status, story.error) == ("steps_not_accepted", said)


def test_an_image_about_which_the_critic_gave_no_answer_is_not_asked_for_again(tmp_path: Path) -> None:
    drawn = FakeGenerator()
    away = parts(plan_of("one"), lambda shown, seed: BackendError("unreachable", "down"), drawn)
    assert run(tmp_path, away)[0].status == "critic_failed"
    again = parts(plan_of("one"))
    (story,) = run(tmp_path, again, retry_failed=True)
    assert (story.status, story.spent.generations, story.spent.critic_calls) == ("complete", 1, 2)
    assert (len(drawn.jobs), again.generator.jobs) == (1, [])
    assert run(tmp_path, parts(), retry_failed=True) == [story]


def test_a_critic_that_fails_ends_the_story(tmp_path: Path) -> None:
    made = parts(plan_of("one", "two"), lambda shown, seed: BackendError("refused", "wrong token"))
    (trajectory,) = run(tmp_path, made)
    assert (trajectory.status, trajectory.error) == ("critic_failed", "step 1: refused: wrong token")
    assert len(made.generator.jobs) == 1


def test_out_of_memory_in_mid_story(tmp_path: Path) -> None:
    generator = FakeGenerator(fails=lambda job: BackendError("out_of_memory", "no room") if job.sources else None)
    (trajectory,) = run(tmp_path, parts(plan_of("one", "two"), generator=generator), loop=LoopConfig(max_attempts=5))
    assert trajectory.status == "generator_failed"
    assert trajectory.selected == {1: 1}
    assert [a.status for a in attempts(tmp_path)] == ["accepted"] + ["generator_failed"] * 5


def test_what_is_refused_for_good_is_asked_once(tmp_path: Path) -> None:
    generator = FakeGenerator(fails=lambda job: BackendError("refused", "no such model"))
    run(tmp_path, parts(plan_of("one"), generator=generator))
    assert len(generator.jobs) == 1


def test_time_is_bounded(tmp_path: Path) -> None:
    made = parts(plan_of(*["x"] * 8), generator=FakeGenerator(latency=0.05))
    (trajectory,) = run(tmp_path, made, loop=LoopConfig(max_seconds=0.12))
    assert trajectory.status == "budget_exhausted"
    assert 1 <= len(made.generator.jobs) <= 3


def test_one_request_in_ten_that_fails_changes_no_other(tmp_path: Path) -> None:
    requests = [ask(f"r{i}", f"text {i}") for i in range(50)]

    def broken(job: GenerationRequest) -> Exception | None:
        return RuntimeError("bug") if job.prompt == "bad" else None

    def planner(bad: bool) -> FakePlanner:
        return FakePlanner(lambda r, s: plan_of(f"{r.id} one", "bad" if bad and r.id.endswith("3") else f"{r.id} two"))

    def accept(shown: CriticInput, seed: int) -> tuple[bool, str]:
        return seed % 2 == 0, shown.prompt_used + "!"

    for name in ("good", "bad"):
        made = Components(planner(name == "bad"), FakeCritic(accept), FakeGenerator(fails=broken))
        run(tmp_path / name, made, requests)
    good, bad = without_times(tmp_path / "good"), without_times(tmp_path / "bad")
    for name in good:
        if name.endswith("3"):
            assert bad[name][1]["status"] == "internal_error"
            assert bad[name][1]["error"] == "RuntimeError: bug"
        else:
            assert bad[name] == good[name]


def test_a_full_disk_stops_the_run_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full; make room"):
        run(tmp_path, parts())
    monkeypatch.setattr(os, "fsync", real)
    (trajectory,) = run(tmp_path, parts())
    assert trajectory.status == "complete"


# --- resume ----------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As if the process were killed."""


def picky(shown: CriticInput, seed: int) -> tuple[bool, str]:
    return seed % 3 == 0, shown.prompt_used + "!"


@pytest.mark.parametrize("after", range(1, 12))
def test_a_run_cut_after_any_record_goes_on_to_the_same_records(tmp_path: Path, after: int) -> None:
    requests = [ask("a"), ask("b")]

    def make() -> Components:
        return parts(plan_of("one", None, "three"), picky)

    run(tmp_path / "whole", make(), requests)
    count = 0

    def cut(record: Record) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "cut", make(), requests, on_record=cut)
    run(tmp_path / "cut", make(), requests)
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")


@pytest.mark.parametrize("how", ["missing", "empty", "another"])
def test_an_image_that_is_lost_is_made_again(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    requests = [ask("a"), ask("b")]

    def make() -> Components:
        return parts(plan_of("one", "two"))

    run(tmp_path / "whole", make(), requests)
    run(tmp_path / "cut", make(), requests)
    trace = tmp_path / "cut" / "trace.jsonl"
    kept = [line for line in trace.read_bytes().splitlines(True) if b'"trajectory"' not in line or b'"id":"b"' in line]
    trace.write_bytes(b"".join(kept))
    second = attempts(tmp_path / "cut")[1]
    assert second.image_id is not None
    file = ImageStore(tmp_path / "cut" / "images").path(second.image_id)
    if how == "missing":
        file.unlink()
    else:
        content = io.BytesIO()
        Image.new("RGB", (4, 4), "red").save(content, "PNG")
        file.write_bytes(content.getvalue() if how == "another" else b"")
    again = make()
    run(tmp_path / "cut", again, requests)
    assert "step 2 is done again from attempt 1 on" in caplog.text
    assert len(again.generator.jobs) == 1
    cut, whole = without_times(tmp_path / "cut"), without_times(tmp_path / "whole")
    spent = [story["a"].pop() for story in (cut, whole)]
    assert [one["generations"] for one in spent] == [3, 2]
    assert cut == whole


def test_what_followed_a_lost_image_is_no_part_of_the_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without seeds answers with another image, and a kill comes before the next step is made again."""

    class Kill(BaseException):
        pass

    def killed(request: GenerationRequest) -> BackendError | None:
        if request.prompt == "two":
            raise Kill
        return None

    run(tmp_path, parts())
    monkeypatch.setattr("backends.picture_of", lambda request: picture_of(replace(request, seed=request.seed + 1)))
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes(b"".join(trace.read_bytes().splitlines(True)[:-1]))
    first = attempts(tmp_path)[0]
    ImageStore(tmp_path / "images").path(first.image_id or "").unlink()
    with pytest.raises(Kill):
        run(tmp_path, parts(generator=FakeGenerator(fails=killed)))
    (story,) = run(tmp_path, parts())
    one, two = attempts(tmp_path)
    assert (story.status, one.image_id != first.image_id, two.source_ids) == ("complete", True, (one.image_id,))
    assert story.spent.generations == 4


def test_an_engine_runs_in_one_event_loop_after_the_other_and_does_nothing_twice(tmp_path: Path) -> None:
    made = parts()
    with Trace(tmp_path) as trace:
        engine = Engine(made, LoopConfig(), 0, trace, ImageStore(tmp_path / "images"))
        for names in ("abcdef", "abcdefghijkl"):
            assert {one.status for one in asyncio.run(engine.run_all([*map(ask, names)]))} == {"complete"}
        assert len(made.generator.jobs) == 12 * len(attempts(tmp_path))


def test_an_engine_that_tries_failed_stories_again_goes_on_with_them(tmp_path: Path) -> None:
    made = parts(plan_of("one", "two"))
    made.generator.fails = lambda job: (
        BackendError("unreachable", "down") if len(made.generator.jobs) in (2, 3) else None
    )
    with Trace(tmp_path) as trace:
        engine = Engine(made, LoopConfig(), 0, trace, ImageStore(tmp_path / "images"), retry_failed=True)
        stories = [asyncio.run(engine.run(ask())) for _ in range(3)]
    assert [story.status for story in stories] == ["generator_failed", "complete", "complete"]
    assert len(made.generator.jobs) == stories[1].spent.generations == 4


def test_a_request_whose_image_is_lost_ends_alone(tmp_path: Path) -> None:
    given = HashedImage.from_pil(Image.new("RGB", (4, 4), "green"))
    lost = Request(id="b", text="a story", image_ids=(given.id,))
    stories = run(tmp_path, parts(), [lost, ask("a")])
    assert [story.status for story in stories] == ["internal_error", "complete"]
    assert "no such image" in (stories[0].error or "")
    ImageStore(tmp_path / "images").put(given)
    assert [story.status for story in run(tmp_path, parts(), [lost, ask("a")], retry_failed=True)] == ["complete"] * 2


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    made = parts()
    first = run(tmp_path, made)
    again = parts()
    assert run(tmp_path, again) == first
    assert again.generator.jobs == []


def test_failed_stories_can_be_tried_again(tmp_path: Path) -> None:
    def make(down: bool) -> Components:
        fails = (lambda job: BackendError("unreachable", "down") if job.prompt == "two" else None) if down else None
        return parts(plan_of("one", "two"), generator=FakeGenerator(fails=fails or (lambda job: None)))

    assert run(tmp_path, make(True))[0].status == "generator_failed"
    assert run(tmp_path, make(False))[0].status == "generator_failed"
    good = make(False)
    assert run(tmp_path, good, retry_failed=True)[0].status == "complete"
    assert [job.prompt for job in good.generator.jobs] == ["two"]
    run(tmp_path / "whole", make(False))
    records, whole = without_times(tmp_path)["a"], without_times(tmp_path / "whole")["a"]
    spent = records.pop(), whole.pop()
    assert records == whole, "the attempts of the outage are no part of the story"
    assert [one["generations"] for one in spent] == [4, 2]


def test_what_a_story_went_on_from_is_not_tried_again(tmp_path: Path) -> None:
    """An attempt that failed in the middle, and one at the end, which ended the story."""
    fails = [True, False, False, True, True, True]
    broken = FakeGenerator(fails=lambda job: BackendError("unreachable", "down") if fails.pop(0) else None)
    made = parts(plan_of("one", "two", "three"), generator=broken)
    assert run(tmp_path, made, loop=LoopConfig(max_attempts=3))[0].status == "generator_failed"
    good = parts(plan_of("one", "two", "three"))
    (story,) = run(tmp_path, good, loop=LoopConfig(max_attempts=3), retry_failed=True)
    assert (story.status, story.selected) == ("complete", {1: 2, 2: 1, 3: 1})
    assert [job.prompt for job in good.generator.jobs] == ["three"]


def test_a_planner_that_failed_is_asked_with_other_seeds(tmp_path: Path) -> None:
    seeds: list[int] = []

    def plan(request: Request, seed: int) -> Plan | str:
        seeds.append(seed)
        return plan_of("one") if len(seeds) > 5 else "mumble"

    made = Components(FakePlanner(plan), None, FakeGenerator())
    assert run(tmp_path, made)[0].status == "planner_failed"
    assert run(tmp_path, made, retry_failed=True)[0].status == "complete"
    assert len(set(seeds)) == 6


def chain_hash(folder: Path) -> str:
    return hashlib.sha256(json.dumps(without_times(folder), sort_keys=True).encode()).hexdigest()


@pytest.mark.slow
def test_killed_at_twenty_moments_a_batch_ends_as_if_it_were_not(tmp_path: Path) -> None:
    """A process of its own, 30 requests, SIGKILL at moments spread over its time."""
    script = Path(__file__).parents[1] / "killed_batch.py"

    def start(folder: Path) -> subprocess.Popen[bytes]:
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.Popen([sys.executable, str(script), str(folder)], env=env, stdout=subprocess.PIPE)

    began = time.monotonic()
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0
    seconds = time.monotonic() - began
    killed = 0
    for moment in range(20):
        folder = tmp_path / "cut"
        process = start(folder)
        assert process.stdout
        process.stdout.readline()  # imports are over
        time.sleep(seconds * (moment * 7 % 20) / 400)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 10
    assert start(tmp_path / "cut").wait() == 0
    assert chain_hash(tmp_path / "cut") == chain_hash(tmp_path / "whole")


# --- throughput and controls -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_throughput_is_that_of_the_slowest_stage(tmp_path: Path) -> None:
    """200 requests of two steps; the generator takes 8 at once for 80 ms each: 400 images take at least 4 s."""
    made = Components(
        FakePlanner(lambda r, s: plan_of("one", "two"), latency=0.1),
        FakeCritic(lambda shown, seed: (True, shown.prompt_used), latency=0.05),
        FakeGenerator(latency=0.08, limit=8),
    )
    requests = [ask(f"r{i}") for i in range(200)]
    _, seconds = run(tmp_path, made, requests, LoopConfig(concurrency=64), run_loop=virtual_time.run)
    assert 400 * 0.08 / 8 / seconds >= 0.95


def test_random_rewrite_does_not_look() -> None:
    critic = RandomRewrite(0.5, ("x", "y"))
    pictures = [HashedImage.from_pil(Image.new("RGB", (2, 2), colour)) for colour in ("red", "green", "blue")]
    answers = [
        [asyncio.run(critic.judge(CriticInput(pictures[0], after, "p", "p"), seed)).verdict for seed in range(200)]
        for after in pictures[1:]
    ]
    assert answers[0] == answers[1]
    accepted = [v for v in answers[0] if v and v.success]
    assert 70 <= len(accepted) <= 130
    assert {v.refined_prompt for v in answers[0] if v and not v.success} == {"p x", "p y"}
