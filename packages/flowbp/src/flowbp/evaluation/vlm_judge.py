"""UnifiedReward, or a similar model, behind an OpenAI-compatible endpoint: scores from 1 to 5.

The papers' UR-Align and UR-IQ are such scores of UnifiedReward-7b-v1.5.  Our questions differ from theirs, and scores
depend on the words of the question: compare them only with scores for the same questions.
"""

import http.client
import json
import os
import random
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from PIL import Image

from imgen_common.errors import UserError
from imgen_common.images import data_uri

Criterion = Literal["ur_align", "ur_iq"]
KEY_VARIABLE = "FLOWBP_JUDGE_KEY"
"""Environment variable with the API key.  It has a name of its own so that the key of another service is never sent."""
IMAGE_SIDE = 512
RETRIED_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)
"""Status codes of a server that may be busy or starting up."""
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
    """The score in an answer if it is from 1 to 5, given once and in the requested form; otherwise None."""
    found = {float(text) for text in FINAL_SCORE.findall(answer)}
    return found.pop() if len(found) == 1 and max(found) <= 5 else None


@dataclass(frozen=True)
class Judge:
    """Scores images for their prompts, with up to `max_concurrency` requests at a time."""

    criterion: Criterion
    url: str
    model: str
    max_concurrency: int = 8
    max_tries: int = 5
    """Requests that are made for an image before the judge gives up."""
    initial_backoff: float = 1.0
    """Seconds before the second try; doubled before each later one."""
    timeout: float = 300.0
    key: str = field(default_factory=lambda: os.environ.get(KEY_VARIABLE, ""), repr=False)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Judgment]:
        """A judgment of each image.  Raises UserError if the endpoint does not answer."""
        with ThreadPoolExecutor(self.max_concurrency) as pool:
            return list(pool.map(self._judge_image, images, prompts))

    def _judge_image(self, image: Image.Image, prompt: str) -> Judgment:
        answer = self._send(self._question(image, prompt))
        score = parse_score(answer)
        return Judgment(score, "" if score is not None else answer[-MAX_KEPT_ANSWER:])

    def _question(self, image: Image.Image, prompt: str) -> bytes:
        shown = {
            "type": "image_url",
            "image_url": {"url": data_uri(image.convert("RGB").resize((IMAGE_SIDE, IMAGE_SIDE)))},
        }
        asked = {"type": "text", "text": QUESTIONS[self.criterion].format(prompt=prompt) + ANSWER_FORMAT}
        messages = [{"role": "user", "content": [shown, asked]}]
        body = {"model": self.model, "temperature": 0, "max_tokens": 1024, "messages": messages}
        return json.dumps(body).encode()

    def _send(self, body: bytes) -> str:
        """The text of the answer."""
        failure = ""
        for attempt in range(self.max_tries):
            if attempt:
                time.sleep(self.initial_backoff * 2 ** (attempt - 1) * random.uniform(1, 1.5))
            try:
                with urlopen(self._request(body), timeout=self.timeout) as response:
                    return _text(json.load(response))
            except HTTPError as error:
                failure = f"{error.code} {error.reason}"
                error.close()
                if error.code not in RETRIED_STATUS:
                    break
            except (OSError, http.client.HTTPException) as error:
                failure = str(error) or type(error).__name__
            except (ValueError, LookupError, TypeError):
                failure = "an answer that is no chat completion"
                break
        raise UserError(
            f"judge {urlsplit(self.url).netloc}, model {self.model!r}: {failure} "
            f"(try {attempt + 1} of {self.max_tries}); check --judge, the model's name and {KEY_VARIABLE}, then run "
            "the command again: scores made so far are kept"
        )

    def _request(self, body: bytes) -> Request:
        request = Request(self.url.rstrip("/") + "/chat/completions", body, {"Content-Type": "application/json"})
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        return request


def _text(answer: Any) -> str:
    text = answer["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise TypeError
    return text


def check_url(url: str | None) -> str:
    """The base URL of an endpoint.  Raises UserError if it is not one, or has a password, which logs would keep."""
    parts = urlsplit(url or "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"--judge {url or ''}: must be the base URL of an OpenAI-compatible endpoint: http or https, host, /v1"
        )
    if parts.username or parts.password:
        raise UserError(f"--judge {parts.hostname}: must contain no name or password; put the key into {KEY_VARIABLE}")
    return url or ""
