"""Finished stories, and the reference's records of them: of data construction, UEval and interleaved sequences."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from pydantic import BaseModel, ConfigDict, Field

from imgen_common.errors import UserError
from interleave.formats.files import Reader, beside, checked, json_file, json_list, write_json
from interleave.parsing import Unreadable, plan_of
from interleave.prompts import inert, plan_object, safe_json
from interleave.records import Attempt, GeneratorInfo, Plan, PlannerRecord, PlanStep, Record, Request, Spent, Trajectory
from interleave.store import PictureStore

IMAGE_TOKEN = "<image><img_token></image>"
TARGET_NAME = re.compile(r"step(\d+)_(\d+)\.png")
IMPORTED = "imported"
UNKNOWN_SEED = -1


@dataclass(frozen=True)
class Story:
    """A finished request and its attempts, by step and attempt."""

    trajectory: Trajectory
    attempts: tuple[Attempt, ...]

    def judged(self) -> list[Attempt]:
        """The attempts that have a verdict."""
        return [attempt for attempt in self.attempts if attempt.verdict is not None]

    def chosen(self) -> dict[int, Attempt]:
        """The attempt that the story shows, of each drawn step."""
        selected = self.trajectory.selected
        return {a.step: a for a in self.attempts if selected.get(a.step) == a.attempt}

    def steps(self) -> list[tuple[PlanStep, Attempt | None]]:
        """The steps told, in order, each with its chosen attempt, or None where it is text alone."""
        chosen = self.chosen()
        plan = self.trajectory.plan.steps if self.trajectory.plan is not None else ()
        return [(step, chosen.get(step.index)) for step in plan if step.kind == "text" or step.index in chosen]


def pair(attempt: Attempt) -> tuple[str, str]:
    """The pictures before and after."""
    if attempt.before_id is None or attempt.image_id is None:
        raise ValueError(f"{attempt.trajectory_id}: step {attempt.step}, attempt {attempt.attempt} has no two pictures")
    return attempt.before_id, attempt.image_id


# --- execution records of data construction --------------------------------------------------------------------------


class _JudgedStep(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    step: int
    prompt: str
    refine_prompt: str
    source_img: str
    target_img: str
    success: bool
    reasoning: str


class _ExecutionRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    user_input: str
    global_context: dict[str, Any]
    steps: list[_JudgedStep]


def read_execution_record(file: Path, root: Path, pictures: PictureStore) -> Story:
    """A trajectory of the reference's data construction: `NAME/execution_record.json` with its pictures.

    The prompt of an attempt is the one proposed when the attempt before it failed.  The planner's object is kept
    word for word in `planner.raw`.  Raises UserError naming the step.
    """
    record = checked(_ExecutionRecord, json_file(file), str(file))
    plan = plan_of(record.global_context, str(record.global_context.get("reasoning") or ""), "tolerant")
    if isinstance(plan, Unreadable):
        raise UserError(f"{file}: global_context: {plan.reason}")
    folder = file.resolve().parent.name
    name = unquote(folder.removesuffix(f"_{_slug(record.user_input)}")) or folder
    numbers = [item["step_number"] for item in record.global_context["execution_plan"]]
    reader = Reader(root, pictures, file.parent)
    attempts: list[Attempt] = []
    for number, item in enumerate(record.steps, 1):
        where = f"{file}: step record {number}"
        if item.step not in numbers:
            raise UserError(f"{where}: the plan has no step {item.step}")
        attempts.append(_judged_attempt(item, numbers.index(item.step) + 1, name, attempts, reader, where))
    raw = json.dumps(record.global_context, ensure_ascii=False)
    planner = PlannerRecord(model=IMPORTED, template="", template_hash="", raw=raw)
    return _story(name, record.user_input, planner, plan, attempts, {a.step: a.attempt for a in attempts if a.verdict})


def _story(
    name: str,
    text: str,
    planner: PlannerRecord | None,
    plan: Plan,
    attempts: Sequence[Attempt],
    selected: Mapping[int, int],
) -> Story:
    """An imported story; it was given a picture if its first attempt edits one."""
    missing = [step.index for step in plan.steps if step.kind == "image" and step.index not in selected]
    num_judged = sum(attempt.verdict is not None for attempt in attempts)
    trajectory = Trajectory(
        id=name,
        request=Request(id=name, text=text, image_ids=attempts[0].source_ids if attempts else ()),
        planner=planner,
        plan=plan,
        selected=selected,
        status="budget_exhausted" if missing else "complete",
        spent=Spent(generations=len(attempts), critic_calls=num_judged, planner_calls=1),
    )
    return Story(trajectory, tuple(attempts))


def _judged_attempt(
    item: _JudgedStep, step: int, name: str, earlier: Sequence[Attempt], reader: Reader, where: str
) -> Attempt:
    found = TARGET_NAME.fullmatch(Path(item.target_img).name)
    if found is None:
        raise UserError(f"{where}: target_img must be named stepN_SEED.png, got {item.target_img!r}")
    same = [a for a in earlier if a.step == step]
    used = _next_prompt(same, item.prompt)
    return Attempt(
        trajectory_id=name,
        step=step,
        attempt=len(same) + 1,
        **reader.edit(item.source_img, item.target_img, not any(a.verdict for a in earlier), where),
        original_prompt=item.prompt,
        prompt_used=used,
        seed=int(found[2]),
        generator=GeneratorInfo(id=IMPORTED),
        verdict=item.success,
        refined_prompt=used if item.success and not item.refine_prompt else item.refine_prompt,
        reasoning=item.reasoning,
        critic_tries=1,
        status="accepted" if item.success else "rejected",
    )


def _next_prompt(earlier: Sequence[Attempt], original: str) -> str:
    """With what prompt a step is drawn after its `earlier` attempts."""
    last = earlier[-1] if earlier else None
    if last is None:
        return original
    return last.prompt_used if last.verdict else last.refined_prompt or original


def write_execution_record(story: Story, root: Path, pictures: PictureStore) -> Path:
    """Write `root/ID_REQUEST/execution_record.json` and its pictures; the file's path.

    The format holds the judged attempts only, of each the picture it was compared with as its one source, and none of
    times, scores, models, budgets.  Raises UserError where it would tell a prompt wrong: an attempt whose prompt is not
    the one its predecessor proposed.
    """
    trajectory = story.trajectory
    folder = root / f"{_folder(trajectory.id)}_{_slug(trajectory.request.text)}"
    if trajectory.plan is None:
        raise UserError(f"{trajectory.id}: has no plan ({trajectory.status}), so no execution record can be written")
    context = _global_context(trajectory.planner, trajectory.plan)
    numbers = [item["step_number"] for item in context["execution_plan"]]
    copies = _Copies(folder, pictures)
    steps: list[dict[str, Any]] = []
    earlier: list[Attempt] = []
    for attempt in story.judged():
        where = f"{trajectory.id}: step {attempt.step}, attempt {attempt.attempt}"
        if attempt.prompt_used != _next_prompt([a for a in earlier if a.step == attempt.step], attempt.original_prompt):
            raise UserError(f"{where}: not drawn with the prompt proposed before it; this format cannot say so")
        earlier.append(attempt)
        number = numbers[attempt.step - 1]
        source, target = copies.put(attempt, f"step{number}_{attempt.seed}.png")
        is_unchanged = attempt.verdict and attempt.refined_prompt == attempt.prompt_used
        steps.append(
            {
                "step": number,
                "prompt": attempt.original_prompt,
                "refine_prompt": "" if is_unchanged else attempt.refined_prompt or "",
                "source_img": source,
                "target_img": target,
                "success": attempt.verdict,
                "reasoning": attempt.reasoning or "",
            }
        )
    record = {"user_input": trajectory.request.text, "global_context": context, "steps": steps}
    return write_json(folder / "execution_record.json", record)


def _global_context(planner: PlannerRecord | None, plan: Plan) -> dict[str, Any]:
    """The planner's object as it was imported, else made of the plan."""
    try:
        value = json.loads(planner.raw if planner is not None and planner.model == IMPORTED else "null")
    except ValueError:
        value = None
    if isinstance(value, dict) and "execution_plan" in value:
        return value
    return {**plan_object(plan), "reasoning": plan.reasoning}


@dataclass(frozen=True)
class _Copies:
    """Files of a story's pictures in its folder."""

    folder: Path
    pictures: PictureStore
    _names: dict[str, str] = field(default_factory=dict)

    def put(self, attempt: Attempt, target: str) -> tuple[str, str]:
        """Copy an attempt's pictures, the second one to `target`; their names.

        Raises UserError if another attempt has that target.
        """
        before, after = pair(attempt)
        if target in self._names.values():
            raise UserError(
                f"{attempt.trajectory_id}: two attempts of step {attempt.step} have the seed {attempt.seed}; "
                "this format cannot tell their pictures apart"
            )
        source = self._names.setdefault(before, f"source_{len(self._names)}.png" if attempt.source_ids else "white.png")
        self.pictures.copy(before, self.folder / source)
        self.pictures.copy(after, self.folder / target)
        self._names[after] = target
        return source, target


def _folder(name: str) -> str:
    """An id as the name of a folder that stays where it is put; `unquote` gives the id back."""
    return quote(name, safe="").replace(".", "%2E")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:80]


# --- UEval -----------------------------------------------------------------------------------------------------------


class UevalAnswer(Record):
    """What the UEval benchmark judges: a task's question, and the pictures and the text of the story."""

    id: str
    prompt: str
    task: str
    image_ids: tuple[str, ...]
    text: str
    extra: Mapping[str, Any] = Field(default_factory=dict)


class _UevalItem(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    id: str
    prompt: str
    task: str
    image_answer: list[str]
    text_answer: str


class _UevalStep(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str
    refine_prompt: str
    source_img: str
    target_img: str


def ueval_answer(story: Story, task: str) -> UevalAnswer:
    """A story as the benchmark judges it: its pictures in order, its words one after the other, nothing between."""
    trajectory, steps = story.trajectory, story.steps()
    return UevalAnswer(
        id=trajectory.id,
        prompt=trajectory.request.text,
        task=task,
        image_ids=tuple(pair(attempt)[1] for _, attempt in steps if attempt is not None),
        text="".join(step.words for step, _ in steps),
    )


def read_ueval(file: Path, root: Path, pictures: PictureStore) -> Iterator[UevalAnswer]:
    """The answers of a UEval run.  Raises UserError naming the item."""
    reader = Reader(root, pictures)
    for where, value in json_list(file):
        item = checked(_UevalItem, value, where)
        yield UevalAnswer(
            id=item.id,
            prompt=item.prompt,
            task=item.task,
            image_ids=tuple(reader.take(path, where) for path in item.image_answer),
            text=item.text_answer,
            extra=item.model_extra or {},
        )


def write_ueval(answers: Iterable[UevalAnswer], file: Path, pictures: PictureStore) -> None:
    """Write the answers, and their pictures to `images/ID/` beside the file."""
    items = [
        {
            **answer.extra,
            "id": answer.id,
            "prompt": answer.prompt,
            "task": answer.task,
            "image_answer": [
                beside(file, f"images/{_folder(answer.id)}/step{number}.png", image_id, pictures)
                for number, image_id in enumerate(answer.image_ids, 1)
            ],
            "text_answer": answer.text,
        }
        for answer in answers
    ]
    write_json(file, items)


def read_ueval_record(answer: UevalAnswer, root: Path, pictures: PictureStore) -> Story:
    """The story behind an answer, from `root/ID/execution_record.json`.

    The format keeps one picture of each step, neither its number nor its seed (-1 here) nor a verdict, and does not say
    which words belong to which step: they all stand at the first.  Raises UserError naming the step.
    """
    file = root / _folder(answer.id) / "execution_record.json"
    value = json_file(file)
    if not isinstance(value, dict) or list(value) != [str(number + 1) for number in range(len(value))] or not value:
        raise UserError(f'{file}: must be an object with the steps "1", "2", ... in order')
    reader = Reader(root, pictures, file.parent)
    steps: list[PlanStep] = []
    attempts: list[Attempt] = []
    for index, (key, item) in enumerate(value.items(), 1):
        where = f"{file}: step {key}"
        step = checked(_UevalStep, item, where)
        steps.append(PlanStep(index=index, prompt=step.prompt, text=answer.text if index == 1 else None))
        attempts.append(
            Attempt(
                trajectory_id=answer.id,
                step=index,
                attempt=1,
                **reader.edit(step.source_img, step.target_img, index == 1, where),
                original_prompt=step.prompt,
                prompt_used=step.refine_prompt or step.prompt,
                seed=UNKNOWN_SEED,
                generator=GeneratorInfo(id=IMPORTED),
                status="unjudged",
            )
        )
    plan = Plan(steps=tuple(steps))
    return _story(answer.id, answer.prompt, None, plan, attempts, {step.index: 1 for step in steps})


def write_ueval_record(story: Story, root: Path, pictures: PictureStore) -> Path:
    """Write `root/ID/execution_record.json` and its pictures: of each drawn step the chosen attempt alone."""
    folder = root / _folder(story.trajectory.id)
    copies = _Copies(folder, pictures)
    steps = {}
    for number, attempt in enumerate((attempt for _, attempt in story.steps() if attempt is not None), 1):
        source, target = copies.put(attempt, f"step{number}.png")
        steps[str(number)] = {
            "prompt": attempt.original_prompt,
            "refine_prompt": attempt.prompt_used if attempt.prompt_used != attempt.original_prompt else "",
            "source_img": source,
            "target_img": target,
        }
    return write_json(folder / "execution_record.json", steps)


# --- interleaved sequences for models that draw and write ------------------------------------------------------------


def write_interleaved(stories: Iterable[Story], file: Path, pictures: PictureStore, reflection: bool = False) -> int:
    """Write {messages, images} items of the stories whose every step succeeded; how many there are.

    The assistant's turn is `<gthink>` the plan's reasoning, and for each step `<plan>` its prompt, the accepted picture
    and `<info>` its text; with `reflection` the rejected pictures too, each picture followed by `<critic>` what was
    said of it.  Unlike the reference's, every tag is closed, and a step without a text costs no story.
    """
    items = []
    for story in stories:
        sequence = _sequence(story, reflection)
        if sequence is None:
            continue
        text, image_ids = sequence
        given = story.trajectory.request.image_ids
        user = IMAGE_TOKEN * len(given) + inert(story.trajectory.request.text)
        items.append(
            {
                "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": text}],
                "images": [beside(file, f"images/{name}.png", name, pictures) for name in (*given, *image_ids)],
            }
        )
    write_json(file, items)
    return len(items)


def _sequence(story: Story, reflection: bool) -> tuple[str, list[str]] | None:
    plan, chosen = story.trajectory.plan, story.chosen()
    if plan is None:
        return None
    parts, image_ids = [f"<gthink>{inert(plan.reasoning)}</gthink>"], []
    for step in plan.steps:
        if step.prompt is not None:
            last = chosen.get(step.index)
            if last is None or not last.verdict:
                return None
            parts.append(f"<plan>{inert(step.prompt)}</plan>")
            shown = [a for a in story.judged() if a.step == step.index and a.attempt <= last.attempt]
            for attempt in shown if reflection else [last]:
                image_ids.append(pair(attempt)[1])
                parts.append(IMAGE_TOKEN + (_criticism(attempt) if reflection else ""))
        if step.text:
            parts.append(f"<info>{inert(step.text)}</info>")
    return "".join(parts), image_ids


def _criticism(attempt: Attempt) -> str:
    said = {"success": attempt.verdict, "refine_prompt": "" if attempt.verdict else attempt.refined_prompt}
    return f"<critic><think>{inert(attempt.reasoning or '')}</think>{safe_json(said)}</critic>"
