"""Asks a judge about many items: several questions at once, equal ones once, and nothing is lost by a kill."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from imgen_common.errors import UserError, one_line
from imgen_common.judging.answers import Answer, AnswerLog
from imgen_common.judging.questions import JudgeError, JudgeModel, Question, Unreadable
from imgen_common.streams import stream_seed

NextQuestions = Callable[[Mapping[str, Any]], Sequence[Question]]
"""next_questions(values) -> the questions of an item that can be asked now.  values: by the names of questions, None
for one that failed."""


@dataclass(frozen=True)
class Judging:
    """A judge, where its answers are kept, and how many items it is asked about at once.

    prompts: hash of the words of the questions, recorded with each answer.
    """

    judge: JudgeModel
    log: AnswerLog
    prompts: str
    concurrency: int = 8

    async def judge_all(
        self, items: Mapping[str, NextQuestions], on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, dict[str, Answer]]:
        """The answers to all questions of all items, by item and question.

        A question that fails is an answer without a value.  Raises UserError once the judge is not there for any
        question; what was answered before is kept.
        """
        room, done = asyncio.Semaphore(self.concurrency), 0

        async def one(name: str) -> dict[str, Answer]:
            nonlocal done
            async with room:
                answers = await self.judge_item(name, items[name])
            done += 1
            on_progress(done, len(items))
            return answers

        try:
            async with asyncio.TaskGroup() as group:
                tasks = {name: group.create_task(one(name)) for name in items}
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return {name: task.result() for name, task in tasks.items()}

    async def judge_item(self, item: str, next_questions: NextQuestions) -> dict[str, Answer]:
        """The answers of one item, question by question as they can be asked."""
        answers: dict[str, Answer] = {}
        while True:
            values = {name: answer.value for name, answer in answers.items()}
            asked = [q for q in await asyncio.to_thread(next_questions, values) if q.name not in answers]
            if not asked:
                return answers
            for question in asked:  # one after the other: an item's equal questions are then asked once
                answers[question.name] = await self._answer(item, question)

    async def _answer(self, item: str, question: Question) -> Answer:
        key = await asyncio.to_thread(question.key, self.judge.id)
        kept = self.log.find(key, item, question.name)
        if kept is not None and (kept.item, kept.question) == (item, question.name):
            return kept
        answer = await self._ask(item, key, question) if kept is None else _reuse(kept, item, question)
        self.log.add(answer)
        return answer

    async def _ask(self, item: str, key: str, question: Question) -> Answer:
        raws: list[str] = []
        tokens = [0, 0]
        value, error, kind = None, None, None
        for attempt in range(question.tries):
            seed = stream_seed(0, f"judge {key}", attempt)
            try:
                reply = await self.judge.ask(question.system, question.message, seed)
                tokens = [tokens[0] + reply.num_prompt_tokens, tokens[1] + reply.num_completion_tokens]
                raws.append(reply.text)
                value, error, kind = question.parse(reply.text), None, None
                break
            except Unreadable as reason:
                error, kind = one_line(str(reason)), "unreadable"
            except JudgeError as failure:
                if failure.is_outage:
                    raise UserError(
                        f"the judge {self.judge.id} does not answer ({failure.kind}: {failure}); what it answered is "
                        "kept: start it again, then run the same command"
                    ) from None
                error, kind = one_line(str(failure)), failure.kind
                if kind == "refused":
                    break
        return Answer(
            item=item,
            question=question.name,
            key=key,
            judge=self.judge.id,
            prompts=self.prompts,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            raws=tuple(raws),
            value=value,
            error=error,
            error_kind=kind,
            num_calls=attempt + 1,
            num_prompt_tokens=tokens[0],
            num_completion_tokens=tokens[1],
        )


def _reuse(kept: Answer, item: str, question: Question) -> Answer:
    costs = {"num_calls": 0, "num_prompt_tokens": 0, "num_completion_tokens": 0}
    return kept.model_copy(update={"item": item, "question": question.name, **costs})
