"""Chat completions of OpenAI-compatible endpoints: how one is asked, and what an answer holds.

What is read beyond OpenAI's own form: content in parts; reasoning that a server split off (`reasoning_content`,
`reasoning`, `reasoning_details`, parts of type `thinking`); a refusal in words; errors under status 200.
"""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from imgen_common.errors import HALF_PAIR
from imgen_common.http.addresses import version_hint
from imgen_common.http.client import HttpClient
from imgen_common.http.failures import HttpError, Refusal, error_in_answer

FILTERED = (
    *("content_filter", "refusal", "sensitive", "guardrail"),  # OpenAI, Anthropic, GLM, Bedrock
    *("safety", "prohibited_content", "recitation", "blocklist", "spii"),  # Google
    *("image_safety", "image_prohibited_content", "image_recitation"),
)
"""Reasons for which a server ends an answer that it will not give, as they begin."""
CUT_OFF = (
    *("length", "max_tokens", "model_length"),
    *("max_output_tokens", "token_limit", "model_context_window_exceeded"),
)
"""Reasons for which a server ends an answer before its end."""
BROKEN_OFF = ("insufficient_system_resource", "network_error", "error", "abort")
"""Reasons for which DeepSeek, GLM, Mistral, OpenRouter and vLLM give up in the middle of an answer."""
BLOCKED = ("promptFeedback", "prompt_feedback", "prompt_filter_results")
"""Where an answer without choices says that the prompt was blocked."""
STREAMED = (
    "it streams its answers, which are read whole here; remove `stream` from `extra`, or switch it off at the server"
)
COMMENTS = re.compile(rb"\A(?:\s*+:[^\n]*+\n)*+\s*+")
"""Lines by which a server keeps a connection open while the model is busy, before an answer of either form."""
LOGPROB_ROUNDING = 1e-3
"""By which a server's log-probabilities may exceed 0, in half precision."""
OPEN, CLOSE = "<think>", "</think>"
ALL_REASONING = "all words stand in the reasoning; is the server's reasoning parser that of another model?"
NOTHING = "the model answered nothing"
BEGINNING = re.compile(r"\s*+<think>")
OTHER_OPEN = re.compile(r"\A\s*+(?:<\|START_THINKING\|>|\[THINK\]|<seed:think>|◁think▷|<\|channel>thought\s)")
OTHER_CLOSE = re.compile(
    r"<\|END_THINKING\|>\s*+(?:<\|START_RESPONSE\|>)?|\[/THINK\]|</seed:think>|◁/think▷|<channel\|>"
)
"""Marks around the thoughts of Command A, Magistral, Seed-OSS, Kimi and Gemma 4, where their server leaves them in."""
OTHER_TAG = re.compile(r"\A\s*+<(thought|thinking|reasoning)>")
"""How Gemini's, Bedrock's and other servers begin with thoughts; elsewhere such a tag is part of the answer."""
HARMONY = re.compile(r"\A\s*+(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>")
HARMONY_ANSWER = "<|channel|>final<|message|>"
"""The thoughts of gpt-oss, and its answer."""
AFTER_ANSWER = re.compile(r"<\|(?:END_RESPONSE|return|end)\|>\s*+\Z")
MARK_TOKENS = frozenset(
    "<think> </think> [THINK] [/THINK] <seed:think> </seed:think> ◁think▷ ◁/think▷ <|channel> <channel|> "
    "<|START_THINKING|> <|END_THINKING|> <|START_RESPONSE|> <|END_RESPONSE|>".split()
)
"""Those that are tokens of their own, and special ones of some models, which decoding leaves out."""


@dataclass(frozen=True)
class Completion:
    """What a chat model answered.

    reasoning: what the server split off from the answer; None where it splits off nothing.  token_probabilities: where
    the server gives them, each token's text and its alternatives' probabilities.
    """

    content: str
    reasoning: str | None = None
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    token_probabilities: tuple[tuple[str, Mapping[str, float]], ...] = ()

    @property
    def is_cut_off(self) -> bool:
        """Whether it ended before its end."""
        return (self.finish_reason or "").lower() in CUT_OFF

    @property
    def text(self) -> str:
        """Reasoning in `<think>` and, after it, the answer, as if the server had split off nothing.

        A chat template that opens `<think>` for the model leaves only `</think>` in the content: it is opened again.
        """
        before, closed, _ = self.content.partition(CLOSE)
        if closed and OPEN in before:
            return self.content
        if closed and not self.reasoning:
            return OPEN + self.content
        return self.content if self.reasoning is None else f"{OPEN}{self.reasoning}{CLOSE}{self.content}"


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning before the first `</think>`, with or without `<think>` before it, and in blocks that follow it, and
    the answer after them.

    Without any both are in the second; of reasoning that never ends there is no answer.
    """
    thoughts, start = [], 0
    while (end := text.find(CLOSE, start)) >= 0:
        before = text[start:end]
        thoughts.append(before.partition(OPEN)[2] if OPEN in before else before)
        start = end + len(CLOSE)
        if not BEGINNING.match(text, start):
            return "\n".join(thoughts), text[start:]
    if BEGINNING.match(text, start):
        return "\n".join([*thoughts, text[start:].partition(OPEN)[2]]), ""
    return "", text


def encode_body(body: Mapping[str, Any], extra: Mapping[str, Any]) -> bytes:
    """The body of a request with further keys over it.  Null leaves a key out, and `max_completion_tokens` takes the
    place of `max_tokens`, since no model takes both."""
    merged = {**body, **extra}
    if "max_completion_tokens" in extra and "max_tokens" not in extra:
        del merged["max_tokens"]
    return json.dumps({key: value for key, value in merged.items() if value is not None}).encode()


async def complete(client: HttpClient, url: str, body: bytes, seconds: float) -> Completion:
    """One request to `url`/chat/completions, without retries.  Raises HttpError, as `client.request`."""
    headers = {"Content-Type": "application/json"}
    data = await client.request("POST", url, "/chat/completions", seconds=seconds, content=body, headers=headers)
    try:
        read = read_completion(data)
        reasoning = None if read.reasoning is None else client.without_token(read.reasoning)
        return replace(read, content=client.without_token(read.content), reasoning=reasoning)
    except HttpError as error:
        raise client.named(url, error, version_hint(url) if error.kind == "malformed_response" else "") from None


def read_completion(data: bytes) -> Completion:
    """The first choice of an answer.

    Raises Refusal where the model or a filter refused, HttpError where the body is an error (`error_in_answer`) or no
    chat completion (`malformed_response`).
    """
    streamed = HttpError("malformed_response", STREAMED, can_retry=False)
    data = COMMENTS.sub(b"", data, count=1)
    if data.startswith((b"data:", b"event:")):
        raise streamed
    try:
        answer = json.loads(data)
        if (error := error_in_answer(answer, "choices")) is not None:
            raise error
        if not answer.get("choices") and (why := [answer[name] for name in BLOCKED if answer.get(name)]):
            raise Refusal(f"the prompt is blocked: {json.dumps(why[0], ensure_ascii=False)[:200]}")
        choice = answer["choices"][0]
        if (error := error_in_answer(choice)) is not None:
            raise error
        usage = answer.get("usage")
        counts = usage if isinstance(usage, dict) else {}  # optional: an odd one does not spoil a good answer
        content, reasoning = _content(choice)
        return Completion(
            content=content,
            reasoning=reasoning,
            finish_reason=_finish_reason(choice),
            num_prompt_tokens=_whole_number(counts.get("prompt_tokens")),
            num_completion_tokens=_whole_number(counts.get("completion_tokens")),
            token_probabilities=_token_probabilities(choice.get("logprobs")),
        )
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # an object in each line
            raise streamed from None
        shown = data[:200].decode("utf-8", "replace")
        raise HttpError(
            "malformed_response", f"not a chat completion ({type(error).__name__}: {str(error)[:100]}): {shown}"
        ) from None


def _finish_reason(choice: Mapping[str, Any]) -> str | None:
    reason = choice.get("finish_reason")
    return reason if isinstance(reason, str) else None


def _whole_number(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _token_probabilities(given: Any) -> tuple[tuple[str, Mapping[str, float]], ...]:
    """Optional as `usage` is: without what is no logarithm of a probability, as some servers send, there are none."""
    with contextlib.suppress(LookupError, TypeError, AttributeError, ValueError, ArithmeticError):
        return tuple(
            (str(t["token"]), {str(o["token"]): _probability(o["logprob"]) for o in t.get("top_logprobs") or ()})
            for t in (given or {}).get("content") or ()
        )
    return ()


def _probability(logprob: float) -> float:
    """Raises ValueError beyond what rounding makes of 0, and for NaN; TypeError for what is no number."""
    if not logprob <= LOGPROB_ROUNDING:
        raise ValueError(f"{logprob}: a log-probability is at most 0")
    return math.exp(min(logprob, 0.0))


def _content(choice: Mapping[str, Any]) -> tuple[str, str | None]:
    """The words of a choice and its reasoning.  Raises HttpError for a refusal, TypeError where there are none."""
    reason = (_finish_reason(choice) or "").lower().replace("-", "_")
    is_filtered, is_cut_off = reason.startswith(FILTERED), reason in CUT_OFF
    is_whole = not (is_filtered or is_cut_off or reason in BROKEN_OFF)
    message = choice["message"] if is_whole else choice.get("message") or {}
    content, refusal = message.get("content"), message.get("refusal")
    split_off = [message[name] for name in ("reasoning_content", "reasoning") if isinstance(message.get(name), str)]
    split_off += _details(message.get("reasoning_details"))
    if isinstance(content, list):
        refusal = refusal or "".join(part["refusal"] for part in content if part.get("type") == "refusal")
        split_off += [_thinking(part["thinking"]) for part in content if part.get("type") == "thinking"]
        content = "".join(part["text"] for part in content if part.get("type") in ("text", "output_text"))
    if refusal and isinstance(refusal, str):
        raise Refusal(f"the model refuses: {refusal}")
    if is_filtered:
        said = f": {content}" if content else ""
        raise Refusal(f"stopped by a content filter (finish_reason {_finish_reason(choice)}){said}")
    if reason in BROKEN_OFF:
        raise HttpError("server_error", f"the server broke its answer off (finish_reason {reason})")
    if content is None and message.get("tool_calls"):
        raise Refusal("the model calls a tool instead of answering; serve it without tools, or name another model")
    if content is None and (is_cut_off or any(split_off)):
        content = ""
    if content is None and message and isinstance(message, dict):
        raise HttpError("malformed_response", f"{NOTHING} (finish_reason {reason or 'none'})")
    if not isinstance(content, str):
        raise TypeError(f"content is {type(content).__name__}, finish_reason {reason or 'none'}")
    content = in_think_marks(content)
    reasoning = next(filter(None, split_off), split_off[0] if split_off else None)
    return HALF_PAIR.sub("\ufffd", content), None if reasoning is None else HALF_PAIR.sub("\ufffd", reasoning)


def _details(parts: Any) -> list[str]:
    """The reasoning of `reasoning_details`, a list of parts with a `text` or a `summary`, or of encrypted ones, which
    have no words; nothing for another form."""
    found = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    texts = [part.get("text") or part.get("summary") for part in found]
    said = "".join(text for text in texts if isinstance(text, str))
    return [said] if said or any(part.get("type") == "reasoning.encrypted" for part in found) else []


def in_think_marks(content: str) -> str:
    """A content whose thoughts stand between `<think>` and `</think>`, whichever marks its model writes."""
    if tag := OTHER_TAG.match(content):
        content = OPEN + content[tag.end() :].replace(f"</{tag[1]}>", CLOSE, 1)
    elif begun := HARMONY.match(content):
        thoughts, closed, answer = content[begun.end() :].rpartition(HARMONY_ANSWER)
        content = f"{OPEN}{thoughts}{CLOSE}{answer}" if closed else OPEN + answer
    else:
        content = OTHER_CLOSE.sub(CLOSE, OTHER_OPEN.sub(OPEN, content), count=1)
    return AFTER_ANSWER.sub("", content)


def _thinking(parts: Any) -> str:
    return parts if isinstance(parts, str) else "".join(part.get("text", "") for part in parts)
