"""Calls of a service that fails: how often, how long, how many at once, and when not at all."""

import asyncio
import email.utils
import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgen_common.http import HttpError, RetryingCaller, RetryPolicy, failure_of_status, retry_after, run_in_thread
from imgen_common.http.failures import ConnectionLost


class Time:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def caller(time: Time, **settings: Any) -> RetryingCaller:
    return RetryingCaller(RetryPolicy(**settings), clock=time, sleep=time.sleep, rng=random.Random(0))


def sends(*outcomes: Any) -> tuple[Callable[[float], Any], list[float]]:
    """Answers or raises in turn, the last one for ever; and what was left each time."""
    left: list[float] = []

    async def send(seconds: float) -> Any:
        outcome = outcomes[min(len(left), len(outcomes) - 1)]
        left.append(seconds)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return send, left


BUSY = HttpError("rate_limited", "busy")


def failure_of(made: RetryingCaller, send: Any) -> HttpError:
    with pytest.raises(HttpError) as caught:
        asyncio.run(made.call(send))
    return caught.value


def test_it_is_sent_again_until_it_answers() -> None:
    time = Time()
    send, left = sends(BUSY, BUSY, "yes")
    assert asyncio.run(caller(time).call(send)) == "yes"
    assert len(left) == 3
    assert left == sorted(left, reverse=True)


def test_a_service_that_stays_busy_is_given_up() -> None:
    send, left = sends(BUSY)
    failure = failure_of(caller(Time(), max_tries=4, deadline=8e4), send)
    assert (failure.kind, str(failure), len(left)) == ("rate_limited", "busy (tried 4 times)", 4)


def test_what_is_refused_is_not_sent_again() -> None:
    send, left = sends(HttpError("refused", "no", can_retry=False))
    assert failure_of(caller(Time()), send).kind == "refused"
    assert len(left) == 1


@given(st.integers(0, 1000), st.floats(0.1, 5), st.floats(1, 100))
def test_waits_double_are_jittered_and_bounded(seed: int, first: float, longest: float) -> None:
    time = Time()
    config = RetryPolicy(initial_backoff=first, max_backoff=longest, max_tries=8, deadline=86400)
    send, _ = sends(BUSY)
    made = RetryingCaller(config, clock=time, sleep=time.sleep, rng=random.Random(seed))
    failure_of(made, send)
    assert len(time.waits) == 7
    assert all(0 <= wait <= min(longest, first * 2**i) for i, wait in enumerate(time.waits))


def test_what_the_service_asks_for_is_waited_but_not_for_ever() -> None:
    time = Time()
    send, _ = sends(
        HttpError("rate_limited", "busy", retry_after=7), HttpError("rate_limited", "busy", retry_after=9999), "yes"
    )
    assert asyncio.run(caller(time, max_backoff=20, initial_backoff=1).call(send)) == "yes"
    assert 7 <= time.waits[0] <= 8
    assert time.waits[1] == 20


def test_no_wait_goes_past_the_deadline() -> None:
    time = Time()
    send, left = sends(HttpError("rate_limited", "busy", retry_after=50))
    assert failure_of(caller(time, deadline=30, max_backoff=100), send).kind == "rate_limited"
    assert (len(left), time.now) == (1, 0)


def test_a_try_that_hangs_is_cut_at_the_deadline() -> None:
    async def hang(left: float) -> None:
        await asyncio.sleep(60)

    failure = failure_of(RetryingCaller(RetryPolicy(deadline=0.05), name="http://slow"), hang)
    assert failure.kind == "timeout"
    assert "http://slow" in str(failure)


def test_a_try_that_hangs_is_given_up_and_sent_again() -> None:
    tries = 0

    async def hang_once(left: float) -> str:
        nonlocal tries
        tries += 1
        await asyncio.sleep(60 if tries == 1 else 0)
        return "yes"

    assert asyncio.run(RetryingCaller(RetryPolicy(timeout=0.05, initial_backoff=1e-6)).call(hang_once)) == "yes"
    assert tries == 2


def test_a_service_that_is_down_is_left_alone_then_tried_by_one() -> None:
    time = Time()
    made = caller(time, failure_threshold=2, max_tries=1, cooldown=20)
    send, left = sends(HttpError("unreachable", "no route"))
    for _ in range(2):
        failure_of(made, send)
    failure = failure_of(made, send)
    assert (failure.kind, str(failure)) == ("unreachable", "not called for another 20 s, since no route")
    assert len(left) == 2
    time.now += 21
    failure_of(made, send)
    assert len(left) == 3
    assert "not called" in str(failure_of(made, send))
    time.now += 21
    good, _ = sends("yes")
    assert asyncio.run(made.call(good)) == "yes"
    assert asyncio.run(made.call(good)) == "yes"


@pytest.mark.parametrize("answer", [HttpError("refused", "no", can_retry=False), BUSY])
def test_a_service_that_refuses_or_is_busy_is_not_down(answer: Exception) -> None:
    made = caller(Time(), failure_threshold=1, max_tries=1)
    send, left = sends(answer)
    for _ in range(3):
        failure_of(made, send)
    assert len(left) == 3


def test_a_refusal_ends_the_rest() -> None:
    time = Time()
    made = caller(time, failure_threshold=1, max_tries=1)
    failure_of(made, sends(HttpError("unreachable", "no route"))[0])
    time.now += 21
    failure_of(made, sends(HttpError("refused", "no", can_retry=False))[0])
    assert asyncio.run(made.call(sends("yes")[0])) == "yes"


def test_while_one_call_tries_a_service_that_was_down_others_fail_at_once() -> None:
    time = Time()
    made = caller(time, failure_threshold=1, max_tries=3)
    failure_of(made, sends(HttpError("unreachable", "no route"))[0])
    time.now += 1000

    async def main() -> list[Any]:
        back = asyncio.Event()

        async def probe(left: float) -> str:
            await back.wait()
            return "yes"

        calls = [asyncio.create_task(made.call(probe)) for _ in range(3)]
        await asyncio.sleep(0)
        back.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(main())
    assert answers[0] == "yes"
    assert [type(answer) for answer in answers[1:]] == [HttpError, HttpError]


def test_tries_end_when_others_find_the_service_down() -> None:
    """Many calls at once on a dead service: as soon as enough have failed, the others stop asking."""
    made = RetryingCaller(RetryPolicy(max_tries=50, initial_backoff=0.01, max_backoff=0.01, failure_threshold=1), 50)
    sent = 0

    async def dead(left: float) -> None:
        nonlocal sent
        sent += 1
        raise HttpError("unreachable", "no route")

    async def main() -> list[Any]:
        first = asyncio.create_task(made.call(dead))
        while sent < 40:  # so that it fails while the others have most of their tries before them
            await asyncio.sleep(0)
        others = [asyncio.create_task(made.call(dead)) for _ in range(4)]
        return await asyncio.gather(first, *others, return_exceptions=True)

    assert {answer.kind for answer in asyncio.run(main())} == {"unreachable"}
    assert sent < 5 * 50


def test_no_more_than_so_many_at_once() -> None:
    made = RetryingCaller(RetryPolicy(), 3)
    now, most = 0, 0

    async def send(left: float) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1

    async def all_of_them() -> None:
        await asyncio.gather(*(made.call(send) for _ in range(10)))

    asyncio.run(all_of_them())
    assert most == 3


def test_retry_after_is_seconds_or_a_date() -> None:
    later = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert retry_after({"retry-after": "7"}) == 7
    assert 80 < (retry_after({"retry-after": later}) or 0) <= 90
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    for odd in ({}, {"retry-after": "soon"}, {"retry-after": "9" * 400}, {"retry-after": "-1"}):
        assert retry_after(odd) is None


@pytest.mark.parametrize(
    ("statuses", "kind", "can_retry"),
    [
        ((408, 409, 425, 429), "rate_limited", True),
        ((500, 502, 503, 504, 522, 529, 530), "server_error", True),
        ((301, 400, 401, 403, 404, 422), "refused", False),
    ],
)
def test_one_table_says_what_a_status_means(statuses: tuple[int, ...], kind: str, can_retry: bool) -> None:
    assert {failure_of_status(status) for status in statuses} == {(kind, can_retry)}


GONE = HttpError("unreachable", "http://host: cannot be reached")
STARTING = HttpError("server_error", "http://host: status 503", status=503)


@pytest.mark.parametrize("seconds", [5, 60, 145])
@pytest.mark.parametrize(
    "failure",
    [GONE, STARTING, *(HttpError("server_error", "behind a gateway", status=status) for status in (502, 521, 530))],
)
def test_the_default_patience_outlasts_a_restart_and_says_so(
    failure: HttpError, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(20):
        caplog.clear()
        time = Time()
        made = RetryingCaller(RetryPolicy(), name="http://host", clock=time, sleep=time.sleep, rng=random.Random(seed))

        async def send(left: float, time: Time = time) -> str:
            if time.now < seconds:
                raise failure
            return "yes"

        assert asyncio.run(made.call(send)) == "yes"
        assert caplog.messages[0] == f"{failure}; waiting up to 5 min for it to come back"
        assert [message.split(" after ")[0] for message in caplog.messages[1:]] == ["http://host: answers again"]


def test_a_long_patience_is_said_in_whole_minutes(caplog: Any) -> None:
    time, policy = Time(), RetryPolicy(deadline=7200, max_tries=100, max_backoff=120)
    send, _ = sends(HttpError("unreachable", "down"), "yes")
    asyncio.run(RetryingCaller(policy, name="host", clock=time, sleep=time.sleep).call(send))
    assert caplog.messages[0] == "down; waiting up to 120 min for it to come back"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (2, []),
        (600, ["status 429; it asks to wait 600 s; waiting up to 7.5 min for it to come back", "host: answers again"]),
    ],
)
def test_a_long_wait_that_a_service_asks_for_is_said(asked: float, said: list[str], caplog: Any) -> None:
    time = Time()
    send, _ = sends(*[HttpError("rate_limited", "status 429", retry_after=asked, status=429)] * 15, "yes")
    made = RetryingCaller(RetryPolicy(), name="host", clock=time, sleep=time.sleep, rng=random.Random(0))
    assert asyncio.run(made.call(send)) == "yes"
    assert time.now <= RetryPolicy().patience(asked)
    assert [message.split(" after ")[0] for message in caplog.messages] == said


@pytest.mark.parametrize(
    ("failure", "tries"),
    [
        (GONE, 16),
        (STARTING, 16),
        (BUSY, 16),
        (HttpError("server_error", "status 500", status=500), 6),
        (HttpError("malformed_response", "no JSON"), 6),
        (HttpError("timeout", "slow"), 6),
    ],
)
def test_only_a_service_that_is_not_there_is_asked_for_minutes(failure: HttpError, tries: int) -> None:
    send, left = sends(failure)
    assert f"(tried {tries} times)" in str(failure_of(caller(Time(), deadline=8e4), send))
    assert len(left) == tries


def test_errors_of_a_server_that_comes_back_are_counted_apart_from_its_absence() -> None:
    send, left = sends(*[GONE] * 8, *[HttpError("malformed_response", "not yet")] * 3, "yes")
    assert asyncio.run(caller(Time()).call(send)) == "yes"
    assert len(left) == 12


@pytest.mark.parametrize(
    ("seconds", "is_paid", "tries"), [(60.0, True, 1), (60.0, False, 6), (0.1, True, 16), (0.1, False, 16)]
)
def test_a_call_whose_connection_is_lost_after_a_while_may_have_been_worked_on(
    seconds: float, is_paid: bool, tries: int
) -> None:
    """As by the limits of a gateway; where a port has no server behind it, as of ssh, it is lost at once."""
    time, sent = Time(), []

    async def send(left: float) -> None:
        sent.append(left)
        time.now += seconds
        raise ConnectionLost("lost")

    with pytest.raises(HttpError, match="lost"):
        asyncio.run(caller(time, deadline=8e4).call(send, is_paid=is_paid))
    assert len(sent) == tries


def test_errors_of_a_server_open_the_breaker() -> None:
    made = caller(Time(), failure_threshold=1, max_tries=1)
    send, left = sends(HttpError("server_error", "status 500"))
    failure_of(made, send)
    assert "not called" in str(failure_of(made, send))
    assert len(left) == 1


def test_a_coroutine_is_run_beside_a_running_loop() -> None:
    async def number() -> int:
        return 3

    async def main() -> int:
        return run_in_thread(number())

    assert run_in_thread(number()) == asyncio.run(main()) == 3


def test_ctrl_c_ends_a_coroutine_that_runs_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    begun = threading.Event()

    async def work() -> None:
        try:
            begun.set()
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    def interrupted(*_: object) -> None:  # as by the handler of the signal, in the thread that waits
        assert begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_in_thread(work())
    assert ended == ["cancelled"]
