"""What it will cost to ask a judge: calls, tokens, money and hours, before the first call."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any

from annotated_types import Ge, Gt

from imgen_common.config import Config
from imgen_common.console import count, format_duration
from imgen_common.errors import UserError
from imgen_common.judging.questions import Question
from imgen_common.judging.runner import NextQuestions

Price = Annotated[float, Ge(0)]


class Prices(Config):
    """What a judge costs, and how its tokens are counted where nobody has asked it yet."""

    prompt: Price = 0.0
    """Price of a million tokens that it reads; 0: nothing, as of a model of your own."""
    completion: Price = 0.0
    """Price of a million tokens that it writes."""
    currency: str = "USD"
    """Of both prices."""
    characters_per_token: Annotated[float, Gt(0)] = 4.0
    """Of texts; about 4 in English."""
    pixels_per_token: Annotated[float, Gt(0)] = 1024.0
    """Of images; 784 for Qwen2.5-VL, 1024 for Qwen3-VL; hosted models have rules of their own."""
    seconds_per_call: Annotated[float, Gt(0)] = 5.0
    """How long a call takes."""


class CostLimits(Config):
    """What asking a judge costs, and above what it must be confirmed."""

    prices: Prices = Prices()
    """What a judge's tokens cost, for the estimate before the first call."""
    confirm_calls: Annotated[int, Ge(0)] = 2000
    """More calls than this need `--yes`."""
    confirm_money: Price = 1.0
    """A higher price than this needs `--yes`."""


@dataclass(frozen=True)
class Cost:
    """Calls, tokens read and written, money, and hours at the given concurrency."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    money: float
    hours: float


def all_questions(
    next_questions: NextQuestions, value_of: Callable[[Question], Any] = lambda question: question.example
) -> list[Question]:
    """All questions of an item.  value_of: what stands for the answer where a later question depends on it."""
    found: dict[str, Question] = {}
    while fresh := [q for q in next_questions({n: value_of(q) for n, q in found.items()}) if q.name not in found]:
        found |= {question.name: question for question in fresh}
    return list(found.values())


def estimate_cost(questions: Iterable[Question], prices: Prices, concurrency: int) -> Cost:
    """The cost of asking each question once; answers that cannot be read, and are asked for again, are not foreseen."""
    calls = read = written = 0
    for question in questions:
        calls += 1
        written += question.answer_tokens
        characters = len(question.system) + sum(len(part) for part in question.message if isinstance(part, str))
        pixels = sum(part.width * part.height for part in question.message if not isinstance(part, str))
        read += ceil(characters / prices.characters_per_token) + ceil(pixels / prices.pixels_per_token)
    return Cost(
        calls=calls,
        prompt_tokens=read,
        completion_tokens=written,
        money=(read * prices.prompt + written * prices.completion) / 1e6,
        hours=calls * prices.seconds_per_call / concurrency / 3600,
    )


def describe_cost(cost: Cost, prices: Prices) -> str:
    """The cost in one line."""
    money = f", {cost.money:{'.2f' if cost.money >= 0.1 else '.2g'}} {prices.currency}" if cost.money else ""
    tokens = f"about {cost.prompt_tokens:,} tokens read and {cost.completion_tokens:,} written"
    return f"{count(cost.calls, 'call')} of the judge, {tokens}{money}, {format_duration(3600 * cost.hours)}"


def confirm_cost(cost: Cost, limits: CostLimits, show: Callable[[str], object], yes: bool, remedy: str) -> None:
    """Shows the cost.  Raises UserError, which ends with the remedy, for one above the limits without `yes`."""
    show(describe_cost(cost, limits.prices))
    if not yes and (cost.calls > limits.confirm_calls or cost.money > limits.confirm_money):
        raise UserError(
            f"more than confirm_calls {limits.confirm_calls} or confirm_money {limits.confirm_money:g} allows; nothing "
            f"was asked yet: {remedy}"
        )
