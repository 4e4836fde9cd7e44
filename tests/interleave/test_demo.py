"""The demo: a story appears step by step in a real browser, and nobody else gets in or is told of it."""

import asyncio
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from backends import plan_of
from browser import FAULTS, WIDTHS, find_faults
from PIL import Image

from imgen_common.errors import UserError
from imgen_common.http import run_in_thread
from interleave import demo
from interleave.protocols import HashedImage
from interleave.records import Attempt, GeneratorInfo, PlannerRecord, PlanRecord, Record, Request, Trajectory
from interleave.serve import open_listener, required_token

TOKEN = "correct horse"


@dataclass
class Teller:
    """Tells a story of two steps, one record each time it is let."""

    asked: list[tuple[str, list[str], int]] = field(default_factory=list)
    gates: list[threading.Event] = field(default_factory=lambda: [threading.Event() for _ in range(4)])
    fails: str | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    async def stream(
        self, text: str, pictures: Sequence[HashedImage], seed: int
    ) -> AsyncGenerator[tuple[Record, HashedImage | None], None]:
        self.asked.append((text, [picture.id for picture in pictures], seed))
        request = Request(id="r", text=text, image_ids=tuple(picture.id for picture in pictures))
        planner = PlannerRecord(model="m", template="t", template_hash="h")
        plan = plan_of("a red circle", "a blue square")
        try:
            await self._let(0)
            if self.fails:
                raise UserError(self.fails)
            yield PlanRecord(trajectory_id="r", request=request, planner=planner, plan=plan), None
            for step, colour in enumerate(("red", "blue"), 1):
                await self._let(step)
                picture = HashedImage.from_pil(Image.new("RGB", (8, 8), colour))
                yield self._attempt(step, picture), picture
            await self._let(3)
            yield (
                Trajectory(
                    id="r", request=request, planner=planner, plan=plan, selected={1: 1, 2: 1}, status="complete"
                ),
                None,
            )
        finally:
            self.ended.set()

    async def _let(self, gate: int) -> None:
        while not self.gates[gate].is_set():
            await asyncio.sleep(0.02)

    def _attempt(self, step: int, picture: HashedImage) -> Attempt:
        return Attempt(
            trajectory_id="r",
            step=step,
            attempt=1,
            op="t2i",
            original_prompt=f"prompt {step}",
            prompt_used=f"prompt {step}",
            seed=1,
            generator=GeneratorInfo(id="g"),
            image_id=picture.id,
            verdict=True,
            status="accepted",
        )


@contextmanager
def served(teller: Teller, token: str | None = None) -> Iterator[str]:
    """The demo on a port of its own; its address."""
    import uvicorn

    door = open_listener("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(demo.create_demo_app(demo.build_page(teller), token), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{door.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        door.close()


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where this process connects to."""
    hosts: list[str] = []
    connect = socket.socket.connect

    def noted(self: socket.socket, address: Any) -> None:
        hosts.append(str(address[0]) if isinstance(address, tuple) else "local")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    return hosts


@contextmanager
def page_at(browser: Any, address: str) -> Iterator[Any]:
    """A page there that may load nothing from elsewhere and raise no error."""
    page = browser.new_page()
    wrong: list[str] = []
    inside = ("data:", "blob:", address)
    page.on("request", lambda request: None if request.url.startswith(inside) else wrong.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(address)
    yield page
    page.close()
    assert wrong == []


def faults_of(page: Any) -> list[str]:
    """What is wrong with the page at the widths of a phone and of a desk, as it is now."""
    found = []
    page.add_style_tag(content="* { transition: none !important }")  # colors as they are to be, not on their way there
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        found += [f"at {width}: {fault}" for fault in page.evaluate(FAULTS)]
    return found


@pytest.mark.slow
def test_a_story_appears_step_by_step(browser: Any, connections: list[str], tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    teller = Teller()
    evil = "draw <b>two</b> shapes ${1+1} {{2}}"
    Image.new("RGB", (9, 9), "green").save(tmp_path / "given.png")
    with served(teller) as address, page_at(browser, address) as page:
        page.get_by_label("Request").fill(evil)
        page.get_by_label("Seed").fill("7")
        page.locator("input[type=file]").set_input_files(tmp_path / "given.png")
        page.locator(".gallery-item, .grid-wrap img, .thumbnail-item").first.wait_for()
        page.get_by_role("button", name="Generate").click()
        page.locator(".story-live h1").wait_for()
        assert page.locator(".story-live h1").inner_text() == evil
        teller.gates[0].set()
        page.locator(".story-live .step").nth(1).wait_for()
        assert page.locator(".story-live .scene svg").count() == 0
        for step in (1, 2):
            teller.gates[step].set()
            page.locator(".story-live .scene svg").nth(step - 1).wait_for()
            assert page.locator(".story-live .scene svg").count() == step
            assert page.locator(".story-live .chip").first.inner_text() == "in progress"
        teller.gates[3].set()
        keep = page.get_by_text("Download the story as one HTML page")
        keep.wait_for()
        assert page.locator(".story-live .chip").first.inner_text() == "complete"
        assert faults_of(page) == []
        with page.expect_download() as download:
            keep.click()
        download.value.save_as(tmp_path / "story.html")
    kept = (tmp_path / "story.html").read_text(encoding="utf-8")
    assert find_faults(browser, (tmp_path / "story.html").as_uri()) == []
    assert kept.count("data:image/png") == 3
    assert "&lt;b&gt;two&lt;/b&gt;" in kept
    given = HashedImage.from_pil(Image.new("RGB", (9, 9), "green")).id
    assert teller.asked == [(evil, [given], 7)]
    assert set(connections) <= {"127.0.0.1", "::1", "local"}


@pytest.mark.slow
def test_what_the_user_can_mend_is_said(browser: Any, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    teller = Teller(fails="the request is <i>empty</i>")
    teller.gates[0].set()
    (tmp_path / "no.png").write_text("no picture")
    with served(teller) as address, page_at(browser, address) as page:
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("the request is <i>empty</i>").wait_for()
        assert page.locator(".story-live .chip").first.inner_text() == "not started"
        page.locator("input[type=file]").set_input_files(tmp_path / "no.png")
        page.locator(".gallery-item, .grid-wrap img, .thumbnail-item").first.wait_for()
        page.get_by_role("button", name="Generate").click()
        said = page.get_by_text("not an image of an allowed format").inner_text()
        assert said.startswith("no.png")
        assert page.get_by_text("the request is").count() == 0  # nothing is left of the message before
        assert faults_of(page) == []
    assert len(teller.asked) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, -1, 2**63, 10**30])
def test_a_seed_that_no_run_can_have_is_refused_before_a_story_begins(seed: int | None) -> None:
    pytest.importorskip("gradio")
    teller = Teller()
    (generate,) = [one.fn for one in demo.build_page(teller).fns.values() if one.name == "generate"]

    async def said() -> list[str]:
        return [html async for html, _ in generate("a square", None, seed)]

    (html,) = run_in_thread(said())  # the browser of other tests runs an event loop in this one
    assert "the seed must be a whole number of at least 0, and below 9223372036854775808" in html
    assert teller.asked == []


@pytest.mark.slow
def test_a_stopped_story_stops_the_work(browser: Any) -> None:
    pytest.importorskip("gradio")
    teller = Teller()
    teller.gates[0].set()
    with served(teller) as address, page_at(browser, address) as page:
        page.get_by_role("button", name="Generate").click()
        page.locator(".story-live .step").nth(1).wait_for()
        page.get_by_role("button", name="Stop").click()
        assert teller.ended.wait(10)
        stopped = page.locator(".story-live").get_by_text("stopped", exact=True)
        stopped.first.wait_for()
        assert stopped.count() == 2  # the story, and the step that was drawn
        assert page.get_by_text("in progress").count() == 0
        page.wait_for_timeout(1000)
        opacity = "sign => getComputedStyle(sign.parentElement).opacity"  # Gradio keeps its sign in the page, unseen
        assert all(sign.evaluate(opacity) == "0" for sign in page.get_by_text("Error", exact=True).all())


@pytest.mark.slow
def test_only_who_has_the_token_comes_in() -> None:
    pytest.importorskip("gradio")
    from starlette.testclient import TestClient

    with TestClient(demo.create_demo_app(demo.build_page(Teller()), TOKEN)) as client:
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "me", "password": TOKEN}).status_code == 200
        assert client.get("/config").status_code == 200
        assert TOKEN not in client.get("/config").text


@pytest.mark.slow
def test_the_open_page_answers_to_this_machines_names_only() -> None:
    pytest.importorskip("gradio")
    from starlette.testclient import TestClient

    app = demo.create_demo_app(demo.build_page(Teller()), None, allowed_hosts=["demo.example"])
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for host in ("localhost:7860", "127.0.0.1", "[::1]:7860", "demo.example"):
            answer = client.get("/", headers={"host": host})
            assert answer.status_code == 200
            assert answer.headers["content-security-policy"] == demo.POLICY
        assert client.get("/", headers={"host": "elsewhere.example"}).status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_no_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(demo.TOKEN, raising=False)
    assert required_token(host, demo.TOKEN) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "some.example"])
def test_others_need_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for unset in (None, ""):
        monkeypatch.delenv(demo.TOKEN, raising=False) if unset is None else monkeypatch.setenv(demo.TOKEN, unset)
        with pytest.raises(UserError, match=f"set {demo.TOKEN}"):
            required_token(host, demo.TOKEN)
    monkeypatch.setenv(demo.TOKEN, TOKEN)
    assert required_token(host, demo.TOKEN) == TOKEN


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)

    def make() -> demo.StoryStreamer:
        raise AssertionError("models are loaded before the extra is looked for")

    with pytest.raises(UserError, match="uv pip install gradio"):
        demo.serve_demo(make, "127.0.0.1", 0)


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_listener("127.0.0.1", 0) as door:
        port = door.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {port}.*choose another host or port"):
            open_listener("127.0.0.1", port)
        monkeypatch.setitem(sys.modules, "gradio", None)  # it is not imported first, which takes seconds
        with pytest.raises(UserError, match="cannot listen on"):
            demo.serve_demo(lambda: pytest.fail("models are loaded"), "127.0.0.1", port)
    with pytest.raises(UserError, match="cannot listen"):
        open_listener("127.0.0.1", 70_000)
