"""UnifiedReward, or any model of its kind, behind an OpenAI-compatible endpoint: marks from 1 to 5.

The papers' UR-Align and UR-IQ are such marks of UnifiedReward-7b-v1.5.  Our questions are worded otherwise than theirs,
and marks depend on the words: compare them within one wording only.
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

Aspect = Literal["ur_align", "ur_iq"]
KEY = "FLOWBP_JUDGE_KEY"
"""Variable of the environment that holds the key; a name of its own, so that no other service's key is sent."""
SIDE = 512
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""Answers of a server that may be busy or about to come up."""
ANSWER_KEPT = 400
"""Characters that are kept of an answer without a mark."""
MARK = re.compile(r"\bfinal score[ *]*:[ *]*([1-5](?:\.\d+)?)(?: ?/ ?5)?[ .*]*$", re.IGNORECASE | re.MULTILINE)
QUESTIONS: dict[Aspect, str] = {
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
FORM = (
    "\n\nBe brief. End with a line of its own in exactly this form, the mark a number from 1 (worst) to 5 (best), "
    "decimals allowed:\nFinal Score: <mark>"
)


class Mark(NamedTuple):
    """What the judge gave, and what it said where that was no mark."""

    score: float | None
    answer: str = ""


def mark(answer: str) -> float | None:
    """The mark of an answer: from 1 to 5, given once, in the form that was asked for; otherwise None."""
    found = {float(text) for text in MARK.findall(answer)}
    return found.pop() if len(found) == 1 and max(found) <= 5 else None


@dataclass(frozen=True)
class Judge:
    """pictures, prompts -> marks; `at_once` questions are out at a time, each asked at most `tries` times."""

    aspect: Aspect
    url: str
    model: str
    at_once: int = 8
    tries: int = 5
    wait: float = 1.0
    """Seconds before the second try; twice as many before each later one."""
    timeout: float = 300.0
    key: str = field(default_factory=lambda: os.environ.get(KEY, ""), repr=False)

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[Mark]:
        """A mark for each picture.  Raises UserError if the endpoint cannot be made to answer."""
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(self._mark, pictures, prompts))

    def _mark(self, picture: Image.Image, prompt: str) -> Mark:
        answer = self._ask(self._question(picture, prompt))
        score = mark(answer)
        return Mark(score, "" if score is not None else answer[-ANSWER_KEPT:])

    def _question(self, picture: Image.Image, prompt: str) -> bytes:
        shown = {"type": "image_url", "image_url": {"url": data_uri(picture.convert("RGB").resize((SIDE, SIDE)))}}
        asked = {"type": "text", "text": QUESTIONS[self.aspect].format(prompt=prompt) + FORM}
        messages = [{"role": "user", "content": [shown, asked]}]
        body = {"model": self.model, "temperature": 0, "max_tokens": 1024, "messages": messages}
        return json.dumps(body).encode()

    def _ask(self, body: bytes) -> str:
        """The answer's text."""
        said = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1) * random.uniform(1, 1.5))
            try:
                with urlopen(self._request(body), timeout=self.timeout) as response:
                    return _text(json.load(response))
            except HTTPError as error:
                said = f"{error.code} {error.reason}"
                error.close()
                if error.code not in RETRIED:
                    break
            except (OSError, http.client.HTTPException) as error:
                said = str(error) or type(error).__name__
            except (ValueError, LookupError, TypeError):
                said = "an answer that is no chat completion"
                break
        raise UserError(
            f"judge {urlsplit(self.url).netloc}, model {self.model!r}: {said} (try {attempt + 1} of {self.tries}); "
            f"check --judge, the model's name and {KEY}, then run the command again: what is scored is kept"
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
    """The base URL of an endpoint.  Raises UserError if it is none, or carries a password, which logs would keep."""
    parts = urlsplit(url or "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"--judge {url or ''}: must be the base URL of an OpenAI-compatible endpoint: http or https, host, /v1"
        )
    if parts.username or parts.password:
        raise UserError(f"--judge {parts.hostname}: must hold no name and password; put the key into {KEY}")
    return url or ""
