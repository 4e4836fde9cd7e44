"""UnifiedReward, or a similar model, behind an OpenAI-compatible endpoint: scores from 1 to 5.

The papers' UR-Align and UR-IQ are such scores of UnifiedReward-7b-v1.5.  Our questions differ from theirs, and scores
depend on the words of the question: compare them only with scores for the same questions.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from PIL import Image

from imgen_common import http
from imgen_common.errors import UserError
from imgen_common.http import HttpClient, HttpError, Refusal, RetryPolicy
from imgen_common.http.chat import complete, encode_body, split_reasoning
from imgen_common.images import data_uri, to_rgb
from imgen_common.judging.questions import JudgeError, JudgeReply, Message, Question, Unreadable

Criterion = Literal["ur_align", "ur_iq"]
KEY_VARIABLE = "FLOWBP_JUDGE_KEY"
"""Environment variable with the API key.  It has a name of its own so that the key of another service is never sent."""
IMAGE_SIDE = 512
POLICY = RetryPolicy(deadline=86400, initial_backoff=1.0)
MAX_TOKENS = 1024
"""Of an answer."""
FINAL_SCORE = re.compile(
    r"\bfinal score[ *]*:[ *]*([1-5](?:\.\d+)?)(?: ?/ ?5)?[ .*]*\r?$", re.IGNORECASE | re.MULTILINE
)
REPEATED = re.compile(r"final score[^\n]*final score", re.IGNORECASE)
"""Two scores on one line."""
# the words of the questions stay as they are: with other words, scores are not comparable with earlier ones
QUESTIONS: dict[Criterion, str] = {
    "ur_align": (
        "The picture was made by a computer from the caption below. Judge only how well it agrees with the caption: go "
        "through everything that the caption names (objects, how many, their looks, what they do, how they lie to each "
        "other, style) and say what is there, what is missing and what is wrong. Do not judge how well the picture is "
        "made.\n\nCaption: {prompt}"
    ),
    "ur_iq": (
        "The picture was made by a computer from the caption below. Judge only how well it is made: sharpness, light "
        "and colour, composition, natural shapes and anatomy, absence of noise, artefacts and broken parts. Do not "
        "judge whether it agrees with the caption.\n\nCaption: {prompt}"
    ),
}
ANSWER_FORMAT = (
    "\n\nBe brief. End with a line of its own in exactly this form, the mark a number from 1 (worst) to 5 (best), "
    "decimals allowed:\nFinal Score: <mark>"
)


PROMPTS = hashlib.sha256(json.dumps([QUESTIONS, ANSWER_FORMAT]).encode()).hexdigest()[:12]
"""Hash of the words, recorded with every answer."""


def parse_score(answer: str) -> float:
    """The score in an answer, from 1 to 5, given once and in the requested form.  Raises Unreadable for anything else.

    What a judge thinks in `<think>` before its answer does not count.
    """
    said = split_reasoning(answer)[1]
    found = {float(text) for text in FINAL_SCORE.findall(said)}
    if len(found) != 1 or max(found) > 5 or REPEATED.search(said):
        raise Unreadable("no single line 'Final Score: ' with a number from 1 to 5")
    return found.pop()


def make_question(criterion: Criterion, image: Image.Image, prompt: str) -> Question:
    """What the judge is asked about an image.  It is asked once, since an answer at temperature 0 does not change."""
    shown = to_rgb(image).resize((IMAGE_SIDE, IMAGE_SIDE))
    asked = QUESTIONS[criterion].format(prompt=prompt) + ANSWER_FORMAT
    return Question(criterion, (shown, asked), parse_score, tries=1)


class EndpointJudge:
    """The judge at an endpoint, with up to `concurrency` requests at a time."""

    def __init__(
        self,
        url: str,
        model: str,
        extra: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        policy: RetryPolicy = POLICY,
    ) -> None:
        """extra: over the keys of each request.  Raises UserError for a key that no header can carry."""
        self._url, self._model, self._extra = url.rstrip("/"), model, dict(extra or {})
        self.id = f"{model} t=0 n={MAX_TOKENS}"
        if extra:
            self.id += f" {json.dumps(self._extra, sort_keys=True)}"
        self._client = HttpClient(url, KEY_VARIABLE, policy, concurrency)

    async def ask(self, system: str, message: Message, seed: int) -> JudgeReply:
        """The answer.  Raises JudgeError."""
        body = await asyncio.to_thread(self._body, message)
        try:
            answer = await self._client.call(lambda seconds: complete(self._client, self._url, body, seconds))
        except HttpError as error:
            raise JudgeError.of_http(error) from error
        ending = f"cut off after {answer.num_completion_tokens or MAX_TOKENS} tokens" if answer.is_cut_off else ""
        counts = answer.num_prompt_tokens, answer.num_completion_tokens
        return JudgeReply(answer.text, *counts, ending, answer.is_cut_off)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _body(self, message: Message) -> bytes:
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_uri(part)}}
            for part in message
        ]
        messages = [{"role": "user", "content": content}]
        body = {"model": self._model, "temperature": 0, "max_tokens": MAX_TOKENS, "messages": messages}
        return encode_body(body, self._extra)


async def check_judge(url: str, model: str, extra: Mapping[str, Any] | None = None) -> None:
    """Asks the judge once about a white image.  Raises UserError if it does not answer."""
    judge = EndpointJudge(url, model, extra, policy=RetryPolicy(max_tries=1))
    question = make_question("ur_iq", Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), "white"), "a white wall")
    try:
        await judge.ask("", question.message, 0)
    except JudgeError as failure:
        cause = failure.__cause__
        status = cause.status if isinstance(cause, HttpError) else None
        if isinstance(cause, Refusal) or failure.kind == "rate_limited" or status in (503, 529):
            return  # it answers, or is there and busy, or loads
        remedy = f"check --judge, the model's name and {KEY_VARIABLE}"
        if status in (400, 422):
            remedy = (
                "if the model does not take a key of the request, leave it out: --set judge.extra={temperature: "
                f"null, max_completion_tokens: {MAX_TOKENS}}}; if not, {remedy}"
            )
        raise UserError(f"judge {model!r}: {failure}; {remedy}") from None
    finally:
        await judge.close()


def check_url(url: str | None) -> str:
    """The base URL of an endpoint.  Raises UserError if it is not one, or has a password, which logs would keep."""
    try:
        return http.check_url(url or "")
    except UserError as error:
        raise UserError(
            f"--judge: must be the base URL of an OpenAI-compatible endpoint ({error}); put the key into {KEY_VARIABLE}"
        ) from None
