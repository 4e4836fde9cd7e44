"""Asks a judge about many items: several questions at once, equal ones once, and nothing is lost by a kill."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from typing import Any

from imgen_common.errors import UserError, one_line
from imgen_common.http.chat import ALL_REASONING, split_reasoning
from imgen_common.judging.answers import Answer, AnswerLog, count_failures
from imgen_common.judging.questions import JudgeError, JudgeModel, JudgeReply, Question, Unreadable
from imgen_common.streams import stream_seed

NextQuestions = Callable[[Mapping[str, Any]], Sequence[Question]]
"""next_questions(values) -> the questions of an item that can be asked now.  values: by the names of questions, None
for one that failed."""


def all_at_once(questions: Callable[[], Sequence[Question]]) -> NextQuestions:
    """Of an item whose questions need no answers; it is called once, so that images are read once."""
    return lambda values: [] if values else questions()


@dataclass(frozen=True)
class Judging:
    """A judge, where its answers are kept, and how many items it is asked about at once.

    prompts: hash of the words of the questions, recorded with each answer.  max_failed: it stops once a question failed
    of more items than this.  how_to_continue: what messages tell the reader to do then, or once the judge is back.
    """

    judge: JudgeModel
    log: AnswerLog
    prompts: str
    concurrency: int = 8
    max_failed: float = inf
    how_to_continue: str = "start it again, then run the same command"

    async def judge_all(
        self, items: Mapping[str, NextQuestions], on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, dict[str, Answer]]:
        """The answers to all questions of all items, by item and question.

        A question that fails is an answer without a value.  Raises UserError once the judge is not there for any
        question, failed too often, or is asked by another process of this part; what was answered before is kept.
        """
        room, done, failed = asyncio.Semaphore(self.concurrency), 0, Counter[str]()

        async def one(name: str) -> dict[str, Answer]:
            nonlocal done
            async with room:
                answers = await self.judge_item(name, items[name])
            failed.update(count_failures({name: answers}))
            if failed.total() > self.max_failed:
                reasons = ", ".join(f"{count} {kind}" for kind, count in failed.most_common())
                last = next(answer.error for answer in answers.values() if answer.error_kind)
                most = int(self.max_failed)
                raise UserError(
                    f"the judge {self.judge.id} failed on {failed.total()} of {len(items)} items ({reasons}; the last: "
                    f"{last}), at most {most} may fail; what it answered is kept: {self.how_to_continue}"
                )
            done += 1
            on_progress(done, len(items))
            return answers

        try:
            with self.log.held():
                async with asyncio.TaskGroup() as group:
                    tasks = {name: group.create_task(one(name)) for name in items}
        except BaseExceptionGroup as errors:
            failure = errors.exceptions[0]
            if not isinstance(failure, JudgeError):
                raise failure from None
            raise UserError(
                f"the judge {self.judge.id} does not answer ({failure.kind}: {failure}); what it answered is kept: "
                f"{self.how_to_continue}"
            ) from None
        return {name: task.result() for name, task in tasks.items()}

    async def judge_item(self, item: str, next_questions: NextQuestions) -> dict[str, Answer]:
        """The answers of one item, question by question as they can be asked.  Raises JudgeError for an outage."""
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
        if kept is None:
            answer = await ask_question(self.judge, question, item, self.prompts)
        else:
            answer = _reuse(kept, item, question)
        self.log.add(answer)
        return answer


async def ask_question(judge: JudgeModel, question: Question, item: str = "", prompts: str = "") -> Answer:
    """The judge's answer to a question, which is asked until an answer can be read.  Raises JudgeError for an outage.

    item, prompts: recorded with the answer.
    """
    key, shown = await asyncio.to_thread(lambda: (question.key(judge.id), question.shown()))
    replies: list[JudgeReply] = []
    value, error, kind = None, None, None
    for attempt in range(question.tries):
        seed = stream_seed(0, f"judge {key}", attempt)
        try:
            replies.append(await judge.ask(question.system, question.message, seed))
            value, error, kind = question.parse(_answer_alone(replies[-1])), None, None
            break
        except Unreadable as reason:
            error, kind = one_line(": ".join(filter(None, (replies[-1].ending, str(reason))))), "unreadable"
        except JudgeError as failure:
            if failure.is_outage:
                raise
            error, kind = one_line(str(failure)), failure.kind
            if kind in ("refused", "bad_request"):
                break
    return Answer(
        item=item,
        question=question.name,
        key=key,
        shown=shown,
        judge=judge.id,
        prompts=prompts,
        date=_now(),
        raws=tuple(reply.text for reply in replies),
        value=value,
        error=error,
        error_kind=kind,
        num_calls=attempt + 1,
        num_prompt_tokens=sum(reply.num_prompt_tokens for reply in replies),
        num_completion_tokens=sum(reply.num_completion_tokens for reply in replies),
    )


def _answer_alone(reply: JudgeReply) -> str:
    """What follows the thoughts, in which a judge names scores that it gives up.

    Raises Unreadable for nothing, and JudgeError where that is the server's doing, which can be mended.
    """
    reasoning, said = split_reasoning(reply.text)
    if reasoning and not said.strip():
        raise Unreadable(ALL_REASONING) if reply.is_cut_off else JudgeError("malformed_response", ALL_REASONING)
    if reply.is_cut_off and not reasoning:  # a chat template may have opened its thoughts, which then have no mark
        raise Unreadable("its last words are missing")
    return said


def _reuse(kept: Answer, item: str, question: Question) -> Answer:
    costs = {"num_calls": 0, "num_prompt_tokens": 0, "num_completion_tokens": 0}
    return kept.model_copy(update={"item": item, "question": question.name, "date": _now(), **costs})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
