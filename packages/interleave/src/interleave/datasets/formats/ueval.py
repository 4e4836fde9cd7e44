"""UEval answers and their records."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from interleave.datasets.files import (
    ImageImporter,
    RowError,
    copy_image,
    read_each,
    read_items,
    read_json,
    validate,
    write_json,
)
from interleave.datasets.formats.execution import IMPORTED, UNKNOWN_SEED, ImageCopies, folder_name, imported_story
from interleave.datasets.rows import FinishedStory, before_and_after
from interleave.records import Attempt, GeneratorInfo, Plan, PlanStep, Record
from interleave.storage.images import ImageStore


class UevalAnswer(Record):
    """What the UEval benchmark judges: a task's question, and the images and the text of the story."""

    id: str
    prompt: str
    task: str
    image_ids: tuple[str, ...]
    text: str
    extra: Mapping[str, Any] = Field(default_factory=dict)


class UevalPrediction(BaseModel):
    """What the benchmark's scorer takes, which looks at `id`, `image_answer` and `text_answer` alone."""

    model_config = ConfigDict(extra="allow", strict=True)
    id: str | int
    prompt: str | None = None
    task: str | None = None
    image_answer: str | list[str | None] | None = None
    text_answer: str | None = None

    @model_validator(mode="after")
    def _has_an_answer(self) -> "UevalPrediction":
        if not self.model_fields_set & {"image_answer", "text_answer"}:
            found = ", ".join(map(repr, self.model_extra or ())) or "none"
            raise ValueError(f"neither text_answer nor image_answer (other keys: {found}); rename its keys to these")
        return self

    @property
    def image_paths(self) -> list[str]:
        given = self.image_answer if isinstance(self.image_answer, list) else [self.image_answer]
        return [path for path in given if path]


class _UevalStep(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    prompt: str
    refine_prompt: str | None = None
    source_img: str
    target_img: str


def ueval_answer(story: FinishedStory, task: str) -> UevalAnswer:
    """A story as the benchmark judges it: its images in order, its words one after the other, nothing between."""
    trajectory, steps = story.trajectory, story.shown_steps()
    return UevalAnswer(
        id=trajectory.id,
        prompt=trajectory.request.text,
        task=task,
        image_ids=tuple(before_and_after(attempt)[1] for _, attempt in steps if attempt is not None),
        text="".join(step.words for step, _ in steps),
    )


def read_ueval(file: Path, root: Path, images: ImageStore, left_out: list[str] | None = None) -> Iterator[UevalAnswer]:
    """The answers of a UEval run; of several with one id, which the benchmark compares as text, the last.

    left_out: where images and items that cannot be read are named.  Without it the first raises UserError.
    """
    reader = ImageImporter(root, images)

    def make(where: str, value: object) -> UevalAnswer:
        item = validate(UevalPrediction, value, where)
        paths = [(where, path) for path in item.image_paths]
        return UevalAnswer(
            id=str(item.id),
            prompt=item.prompt or "",
            task=item.task or "",
            image_ids=tuple(read_each(paths, lambda where, path: reader.import_image(path, where), left_out)),
            text=item.text_answer or "",
            extra=item.model_extra or {},
        )

    answers = {answer.id: answer for answer in read_each(read_items(file), make, left_out)}
    yield from answers.values()


def write_ueval(answers: Iterable[UevalAnswer], file: Path, images: ImageStore) -> None:
    """Write the answers, and their images to `images/ID/` beside the file."""
    items = [
        {
            **answer.extra,
            "id": answer.id,
            "prompt": answer.prompt,
            "task": answer.task,
            "image_answer": [
                copy_image(file, f"images/{folder_name(answer.id)}/step{number}.png", image_id, images)
                for number, image_id in enumerate(answer.image_ids, 1)
            ],
            "text_answer": answer.text,
        }
        for answer in answers
    ]
    write_json(file, items)


def read_ueval_record(answer: UevalAnswer, root: Path, images: ImageStore) -> FinishedStory:
    """The story behind an answer, from `root/ID/execution_record.json`.

    The format keeps one image of each step, neither its number nor its seed (-1 here) nor a verdict, and does not say
    which words belong to which step: they all stand at the first.  Raises RowError naming the step.
    """
    file = _record_file(answer.id, root)
    value = read_json(file)
    numbers = [str(number + 1) for number in range(len(value))] if isinstance(value, dict) else []
    if not numbers or set(numbers) != set(value):
        raise RowError(f'{file}: must be an object with the steps "1", "2", ...')
    reader = ImageImporter(root, images, file.parent)
    steps: list[PlanStep] = []
    attempts: list[Attempt] = []
    for index, key in enumerate(numbers, 1):
        where = f"{file}: step {key}"
        step = validate(_UevalStep, value[key], where)
        steps.append(PlanStep(index=index, prompt=step.prompt, text=answer.text if index == 1 else None))
        attempts.append(
            Attempt(
                trajectory_id=answer.id,
                step=index,
                attempt=1,
                **reader.attempt_images(step.source_img, step.target_img, index == 1, where),
                original_prompt=step.prompt,
                prompt_used=step.refine_prompt or step.prompt,
                seed=UNKNOWN_SEED,
                generator=GeneratorInfo(id=IMPORTED),
                status="unjudged",
            )
        )
    plan = Plan(steps=tuple(steps))
    return imported_story(answer.id, answer.prompt, None, plan, attempts, {step.index: 1 for step in steps})


def _record_file(answer_id: str, root: Path) -> Path:
    """The file as `write_ueval_record` names it, or as the released code does, which takes the id as it is."""
    ours = root / folder_name(answer_id) / "execution_record.json"
    theirs = root / answer_id / "execution_record.json"
    is_inside = "\0" not in answer_id and theirs.resolve().is_relative_to(root.resolve())
    return theirs if not ours.is_file() and is_inside and theirs.is_file() else ours


def write_ueval_record(story: FinishedStory, root: Path, images: ImageStore) -> Path:
    """Write `root/ID/execution_record.json` and its images: of each step with an image the selected attempt alone."""
    folder = root / folder_name(story.trajectory.id)
    copies = ImageCopies(folder, images)
    steps = {}
    for number, attempt in enumerate((attempt for _, attempt in story.shown_steps() if attempt is not None), 1):
        source, target = copies.put(attempt, f"step{number}.png")
        steps[str(number)] = {
            "prompt": attempt.original_prompt,
            "refine_prompt": attempt.prompt_used if attempt.prompt_used != attempt.original_prompt else "",
            "source_img": source,
            "target_img": target,
        }
    return write_json(folder / "execution_record.json", steps)
