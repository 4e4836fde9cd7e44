"""UnifiedReward, or a similar model, behind an OpenAI-compatible endpoint: scores from 1 to 5.

The papers' UR-Align and UR-IQ are such scores of UnifiedReward-7b-v1.5.  Our questions differ from theirs, and scores
depend on the words of the question: compare them only with scores for the same questions.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image

from imgen_common import http
from imgen_common.errors import UserError
from imgen_common.http import HttpClient, HttpError, Refusal, RetryPolicy
from imgen_common.http.chat import complete, split_reasoning
from imgen_common.images import data_uri, to_rgb

Criterion = Literal["ur_align", "ur_iq"]
KEY_VARIABLE = "FLOWBP_JUDGE_KEY"
"""Environment variable with the API key.  It has a name of its own so that the key of another service is never sent."""
IMAGE_SIDE = 512
MAX_KEPT_ANSWER = 400
"""Characters that are kept of an answer without a score."""
FINAL_SCORE = re.compile(r"\bfinal score[ *]*:[ *]*([1-5](?:\.\d+)?)(?: ?/ ?5)?[ .*]*$", re.IGNORECASE | re.MULTILINE)
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


class Judgment(NamedTuple):
    """The score of an image, or None and the answer of the judge."""

    score: float | None
    answer: str = ""


def parse_score(answer: str) -> float | None:
    """The score in an answer if it is from 1 to 5, given once and in the requested form; otherwise None.

    What a judge thinks in `<think>` before its answer does not count.
    """
    found = {float(text) for text in FINAL_SCORE.findall(split_reasoning(answer)[1])}
    return found.pop() if len(found) == 1 and max(found) <= 5 else None


@dataclass(frozen=True)
class Judge:
    """Scores images for their prompts, with up to `max_concurrency` requests at a time."""

    criterion: Criterion
    url: str
    model: str
    max_concurrency: int = 8
    max_tries: int = 16
    """Requests that are made for an image, at most, while the endpoint is not there or busy (`RetryPolicy`)."""
    initial_backoff: float = 1.0
    """Longest wait in seconds before the second try; doubled before each later one."""
    timeout: float = 300.0

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Judgment]:
        """A judgment of each image.  Raises UserError if the endpoint does not answer."""
        return asyncio.run(self._judge_all(images, prompts))

    async def _judge_all(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Judgment]:
        policy = RetryPolicy(
            timeout=self.timeout, deadline=86400, max_tries=self.max_tries, initial_backoff=self.initial_backoff
        )
        client = HttpClient(self.url, KEY_VARIABLE, policy, self.max_concurrency)
        pairs = zip(images, prompts, strict=True)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._judge_image(client, image, prompt)) for image, prompt in pairs]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await client.close()
        return [task.result() for task in tasks]

    async def _judge_image(self, client: HttpClient, image: Image.Image, prompt: str) -> Judgment:
        body = await asyncio.to_thread(self._question, image, prompt)
        try:
            answer = await client.call(lambda seconds: self._send(client, body, seconds))
        except Refusal as refusal:
            return Judgment(None, str(refusal)[-MAX_KEPT_ANSWER:])
        except HttpError as error:
            raise UserError(
                f"judge {self.model!r}: {error}; check --judge, the model's name and {KEY_VARIABLE}, then run the "
                "command again: scores made so far are kept"
            ) from None
        score = parse_score(answer)
        return Judgment(score, "" if score is not None else answer[-MAX_KEPT_ANSWER:])

    def _question(self, image: Image.Image, prompt: str) -> bytes:
        shown = {
            "type": "image_url",
            "image_url": {"url": data_uri(to_rgb(image).resize((IMAGE_SIDE, IMAGE_SIDE)))},
        }
        asked = {"type": "text", "text": QUESTIONS[self.criterion].format(prompt=prompt) + ANSWER_FORMAT}
        messages = [{"role": "user", "content": [shown, asked]}]
        body = {"model": self.model, "temperature": 0, "max_tokens": 1024, "messages": messages}
        return json.dumps(body).encode()

    async def _send(self, client: HttpClient, body: bytes, seconds: float) -> str:
        """The text of the answer."""
        return (await complete(client, self.url.rstrip("/"), body, seconds)).text


def check_url(url: str | None) -> str:
    """The base URL of an endpoint.  Raises UserError if it is not one, or has a password, which logs would keep."""
    try:
        return http.check_url(url or "")
    except UserError as error:
        raise UserError(
            f"--judge: must be the base URL of an OpenAI-compatible endpoint ({error}); put the key into {KEY_VARIABLE}"
        ) from None
