"""The reference's execution records of data construction."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from pydantic import BaseModel, ConfigDict

from imgen_common.errors import UserError
from interleave.agents.parsing import ParseFailure, plan_from_object
from interleave.agents.prompts import plan_object
from interleave.datasets.files import ImageImporter, read_json, validate, write_json
from interleave.datasets.rows import FinishedStory, before_and_after
from interleave.records import Attempt, GeneratorInfo, Plan, PlannerRecord, Request, Spent, Trajectory
from interleave.storage.images import ImageStore

TARGET_NAME = re.compile(r"step(\d+)_(\d+)\.png")
IMPORTED = "imported"
UNKNOWN_SEED = -1


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


def read_execution_record(file: Path, root: Path, images: ImageStore) -> FinishedStory:
    """A trajectory of the reference's data construction: `NAME/execution_record.json` with its images.

    The prompt of an attempt is the one proposed when the attempt before it failed.  The planner's object is kept
    word for word in `planner.raw`.  Raises UserError naming the step.
    """
    record = validate(_ExecutionRecord, read_json(file), str(file))
    plan = plan_from_object(record.global_context, str(record.global_context.get("reasoning") or ""), "tolerant")
    if isinstance(plan, ParseFailure):
        raise UserError(f"{file}: global_context: {plan.reason}")
    folder = file.resolve().parent.name
    name = unquote(folder.removesuffix(f"_{_slug(record.user_input)}")) or folder
    numbers = [item["step_number"] for item in record.global_context["execution_plan"]]
    reader = ImageImporter(root, images, file.parent)
    attempts: list[Attempt] = []
    for number, item in enumerate(record.steps, 1):
        where = f"{file}: step record {number}"
        if item.step not in numbers:
            raise UserError(f"{where}: the plan has no step {item.step}")
        attempts.append(_judged_attempt(item, numbers.index(item.step) + 1, name, attempts, reader, where))
    raw = json.dumps(record.global_context, ensure_ascii=False)
    planner = PlannerRecord(model=IMPORTED, template="", template_hash="", raw=raw)
    return imported_story(
        name, record.user_input, planner, plan, attempts, {a.step: a.attempt for a in attempts if a.verdict}
    )


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
    item: _JudgedStep, step: int, name: str, earlier: Sequence[Attempt], reader: ImageImporter, where: str
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
        **reader.attempt_images(item.source_img, item.target_img, not any(a.verdict for a in earlier), where),
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
    folder = root / f"{folder_name(trajectory.id)}_{_slug(trajectory.request.text)}"
    if trajectory.plan is None:
        raise UserError(f"{trajectory.id}: has no plan ({trajectory.status}), so no execution record can be written")
    context = _global_context(trajectory.planner, trajectory.plan)
    numbers = [item["step_number"] for item in context["execution_plan"]]
    copies = ImageCopies(folder, images)
    steps: list[dict[str, Any]] = []
    earlier: list[Attempt] = []
    for attempt in story.judged_attempts():
        where = f"{trajectory.id}: step {attempt.step}, attempt {attempt.attempt}"
        if attempt.prompt_used != _next_prompt([a for a in earlier if a.step == attempt.step], attempt.original_prompt):
            raise UserError(f"{where}: not generated with the prompt proposed before it; this format cannot hold that")
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


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:80]
