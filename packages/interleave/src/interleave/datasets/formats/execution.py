"""The reference's execution records of data construction."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import quote, unquote

from pydantic import BaseModel, ConfigDict

from imgen_common.errors import UserError
from interleave.agents.parsing import ParseFailure, plan_from_object
from interleave.agents.prompts import plan_object
from interleave.datasets.files import ImageImporter, RowError, read_json, validate, write_json
from interleave.datasets.rows import FinishedStory, before_and_after
from interleave.records import Attempt, GeneratorInfo, Plan, PlannerRecord, Request, Spent, Trajectory
from interleave.storage.images import ImageStore

TARGET_NAME = re.compile(r"step(\d+)_(\d+)\.(?:png|jpe?g|webp)", re.IGNORECASE)
MAX_NAME_BYTES = 255
LEFT_OUT = " both visually and textually"
IMPORTED = "imported"
UNKNOWN_SEED = -1


class _JudgedStep(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    step: int
    """Position in the plan, counted from 1, whatever the plan's own numbers are."""
    prompt: str
    refine_prompt: str | None = None
    source_img: str
    target_img: str
    success: bool
    reasoning: str | None = None


class _ExecutionRecord(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    user_input: str
    global_context: dict[str, Any]
    steps: list[_JudgedStep]


def read_execution_record(file: Path, root: Path, images: ImageStore) -> FinishedStory:
    """A trajectory of the reference's data construction: `ID_REQUEST/execution_record.json` with its images.

    The prompt of an attempt is the one proposed when the attempt before it failed.  The planner's object is kept
    word for word in `planner.raw`.  Raises RowError naming the step.
    """
    record = validate(_ExecutionRecord, read_json(file), str(file))
    plan = _read_plan(record.global_context, str(file))
    name = _id_of(file.resolve().parent.name, record.user_input)
    reader = ImageImporter(root, images, file.parent)
    attempts: list[Attempt] = []
    for number, item in enumerate(record.steps, 1):
        where = f"{file}: step record {number}"
        if not 1 <= item.step <= len(plan.steps):
            raise RowError(f"{where}: the plan has no step {item.step}")
        attempts.append(_judged_attempt(item, name, attempts, reader, where))
    raw = json.dumps(record.global_context, ensure_ascii=False)
    planner = PlannerRecord(model=IMPORTED, template="", template_hash="", raw=raw)
    selected = {a.step: a.attempt for a in attempts if a.verdict}
    return imported_story(name, record.user_input, planner, plan, attempts, selected)


def _read_plan(context: Mapping[str, Any], where: str) -> Plan:
    """The plan; its own numbers of steps, which the released code never reads, and keys that it lacks do not matter."""
    items = context.get("execution_plan")
    if isinstance(items, list) and all(isinstance(item, dict) for item in items):
        empty = dict.fromkeys(("instruction", "prompt", "auxiliary_text"))
        items = [{**empty, **item, "step_number": number} for number, item in enumerate(items, 1)]
    plan = plan_from_object({"execution_plan": items}, str(context.get("reasoning") or ""), "tolerant")
    if isinstance(plan, ParseFailure):
        raise RowError(f"{where}: global_context: {plan.reason}")
    return plan


def imported_story(
    name: str,
    text: str,
    planner: PlannerRecord | None,
    plan: Plan,
    attempts: Sequence[Attempt],
    selected: Mapping[int, int],
) -> FinishedStory:
    """An imported story; it was given an image if its first attempt edits one."""
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
    return FinishedStory(trajectory, tuple(attempts))


def _judged_attempt(
    item: _JudgedStep, name: str, earlier: Sequence[Attempt], reader: ImageImporter, where: str
) -> Attempt:
    found = TARGET_NAME.fullmatch(PureWindowsPath(item.target_img).name)
    if found is None:
        raise RowError(f"{where}: target_img must be named stepN_SEED.png, got {item.target_img!r}")
    same = [a for a in earlier if a.step == item.step]
    used = _next_prompt(same, item.prompt)
    return Attempt(
        trajectory_id=name,
        step=item.step,
        attempt=len(same) + 1,
        **reader.attempt_images(item.source_img, item.target_img, not any(a.verdict for a in earlier), where),
        original_prompt=item.prompt,
        prompt_used=used,
        seed=int(found[2]),
        generator=GeneratorInfo(id=IMPORTED),
        verdict=item.success,
        refined_prompt=item.refine_prompt or (used if item.success else ""),
        reasoning=item.reasoning or "",
        critic_tries=1,
        status="accepted" if item.success else "rejected",
    )


def _next_prompt(earlier: Sequence[Attempt], original: str) -> str:
    """The prompt of a step's attempt after its `earlier` ones."""
    if not earlier:
        return original
    last = earlier[-1]
    return last.prompt_used if last.verdict else last.refined_prompt or original


def write_execution_record(story: FinishedStory, root: Path, images: ImageStore) -> Path:
    """Write `root/ID_REQUEST/execution_record.json` and its images; the file's path.

    The format holds the judged attempts only, of each the image it was compared with as its one source, and none of
    times, scores, models, budgets.  Raises UserError for an attempt whose prompt is not the one that the attempt before
    it proposed.
    """
    trajectory = story.trajectory
    folder = root / _cut(f"{folder_name(trajectory.id)}_{_slug(trajectory.request.text)}")
    if trajectory.plan is None:
        raise UserError(f"{trajectory.id}: has no plan ({trajectory.status}), so no execution record can be written")
    context = _global_context(trajectory.planner, trajectory.plan)
    copies = ImageCopies(folder, images)
    steps: list[dict[str, Any]] = []
    earlier: list[Attempt] = []
    for attempt in story.judged_attempts():
        where = f"{trajectory.id}: step {attempt.step}, attempt {attempt.attempt}"
        if attempt.prompt_used != _next_prompt([a for a in earlier if a.step == attempt.step], attempt.original_prompt):
            raise UserError(f"{where}: not generated with the prompt proposed before it; this format cannot hold that")
        earlier.append(attempt)
        source, target = copies.put(attempt, f"step{attempt.step}_{attempt.seed}.png")
        is_unchanged = attempt.verdict and attempt.refined_prompt == attempt.prompt_used
        steps.append(
            {
                "step": attempt.step,
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
class ImageCopies:
    """Files of a story's images in its folder."""

    folder: Path
    images: ImageStore
    _names: dict[str, str] = field(default_factory=dict)

    def put(self, attempt: Attempt, target: str) -> tuple[str, str]:
        """Copy an attempt's images, the second to `target`; their names.  Raises UserError if `target` is taken."""
        before, after = before_and_after(attempt)
        if target in self._names.values():
            raise UserError(
                f"{attempt.trajectory_id}: two attempts of step {attempt.step} have the seed {attempt.seed}; "
                "this format cannot tell their images apart"
            )
        source = self._names.setdefault(before, f"source_{len(self._names)}.png" if attempt.source_ids else "white.png")
        self.images.copy(before, self.folder / source)
        self.images.copy(after, self.folder / target)
        self._names[after] = target
        return source, target


def folder_name(name: str) -> str:
    """An id as the name of a folder that stays where it is put; `unquote` gives the id back."""
    return quote(name, safe="").replace(".", "%2E")


def _id_of(folder: str, request: str) -> str:
    """The id in the name of a record's folder; the whole name where it was not made of this request."""
    for text in (request.replace(LEFT_OUT, ""), request):  # one of the released scripts leaves these words out
        slug = _slug(text)
        ends = (f"_{slug[:length]}" for length in range(len(slug), 0, -1))
        for name in (folder.removesuffix(end) for end in ends if folder.endswith(end)):
            if name and folder == _cut(f"{name}_{slug}"):
                return unquote(name)
    return folder


def _cut(name: str) -> str:
    """The name of a folder, not longer than file systems take it; a letter may be three bytes or four."""
    return name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")


def _slug(text: str) -> str:
    """What the released scripts make of a request for the name of its folder."""
    return "_".join("".join(c if c.isalnum() or c in " _-" else "_" for c in text).split())[:80] or "sample"
