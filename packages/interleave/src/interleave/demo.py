"""A page on which a story can be asked for and appears step by step (extra `demo`).

It listens on this machine only, unless told otherwise; then it asks for the token in INTERLEAVE_DEMO_TOKEN.  Neither
the server nor the browser fetches anything from elsewhere, and nothing is reported to anyone.
"""

import asyncio
import hmac
import ipaddress
import os
import socket
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from imgen_common import page
from imgen_common.errors import UserError
from imgen_common.images import decode
from interleave.pages.images import Shots
from interleave.pages.run import render
from interleave.pages.story import BEING_TOLD, STYLE, Story, story_html
from interleave.protocols import HashedImage
from interleave.records import Attempt, PlanRecord, Record, Request, Trajectory

if TYPE_CHECKING:
    import gradio
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN = "INTERLEAVE_DEMO_TOKEN"
"""Environment variable that holds the token."""
MAX_PICTURES = 8
MAX_FILE_BYTES = 32 * 2**20
MAX_WAITING = 16
"""Requests that may wait; further ones are told to come later."""
AT_ONCE = 4
"""Stories told at the same time."""
LIVE_SIDES = (384, 256)
"""Longest sides of large pictures while the story is told; the page that can be kept has them larger."""
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'"
NARROW = ".story { --pic: 20rem; } h1 { font-size: 1.5rem; font-weight: 700; }"
EXAMPLES = (
    "draw a red circle, then add a blue square on its right, then make the circle green",
    "draw two yellow triangles",
    "draw a cyan cross, then make it purple",
)


class Storyteller(Protocol):
    """Whoever tells the stories."""

    def stream(
        self, text: str, pictures: Sequence[HashedImage], seed: int
    ) -> AsyncGenerator[tuple[Record, HashedImage | None], None]:
        """The records of one story, each when it is complete, an attempt's with its picture.

        Raises UserError for what the user can mend.  Closed early, it stops the work.
        """
        ...


def launch(make: Callable[[], Storyteller], host: str, port: int) -> None:
    """Serve the page until interrupted.  make: called when all else is known to be in order, as it may load models.

    Raises UserError if the extra is missing, if the address cannot be had, or without a token for others' machines.
    """
    import uvicorn

    token = needed_token(host)
    _gradio()
    with listen(host, port) as door:
        app = application(build(make()), token, host)
        print(f"http://{'[' + host + ']' if ':' in host else host}:{door.getsockname()[1]}", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        server.run(sockets=[door])


def needed_token(host: str) -> str | None:
    """The token that visitors must give; None: nobody else can reach `host` and none is set."""
    token = os.environ.get(TOKEN) or None
    if token is None and not _is_loopback(host):
        raise UserError(f"--host {host} lets others in; set a token in {TOKEN} that they must give, or use 127.0.0.1")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.  Raises UserError if the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host} port {port} ({error}); choose another --port or --host") from None


def application(blocks: "gradio.Blocks", token: str | None, host: str = "127.0.0.1") -> "FastAPI":
    """The page as a web application: behind the token, or without one for who asks for this machine by its own names.

    host: the address it listens on.
    """
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    gr = _gradio()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Headers)
    if token is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host])

    def may_enter(user: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), (token or "").encode())

    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        auth=may_enter if token else None,
        auth_message=f"Any user name; the password is the token in {TOKEN}." if token else None,
        max_file_size=MAX_FILE_BYTES,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        head=f"<style>{page.COLORS}\n.told {{ {page.STYLE}{STYLE}{NARROW} }}</style>",
    )
    return app


class _Headers:
    """Adds what keeps the browser from fetching anything from elsewhere."""

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def send_more(message: "Message") -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        await self._app(scope, receive, send_more)


def build(storyteller: Storyteller) -> "gradio.Blocks":
    """The page's parts and what its buttons do.  Raises UserError if the extra is missing."""
    gr = _gradio()

    async def tell(text: str, files: "list[tuple[str, str | None]] | None", seed: int | None) -> AsyncIterator[Any]:
        try:
            pictures = await asyncio.to_thread(_uploaded, files)
            if seed is None or seed < 0:
                raise UserError("the seed must be a whole number of at least 0")
            async with aclosing(_told(storyteller, text, pictures, seed)) as told:
                async for html, file in told:
                    yield html, gr.DownloadButton(value=file, visible=file is not None)
        except UserError as error:
            raise gr.Error(page.text(str(error)), duration=None, print_exception=False) from None

    with gr.Blocks(title="interleave", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        gr.Markdown("# A story in pictures and words")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                text = gr.Textbox(label="Request", lines=4, max_lines=12, placeholder=EXAMPLES[0], autofocus=True)
                files = _gallery(gr)
                seed = gr.Number(label="Seed", value=0, precision=0, minimum=0)
                with gr.Row():
                    start = gr.Button("Tell", variant="primary")
                    stop = gr.Button("Stop")
                gr.Examples([[example] for example in EXAMPLES], [text], label="For instance")
            with gr.Column(scale=2, min_width=320):
                story = gr.HTML(apply_default_css=False, js_on_load=None, elem_classes=["told"])
                keep = gr.DownloadButton("Keep the story as one HTML page", visible=False)
        telling = start.click(
            tell, [text, files, seed], [story, keep], api_visibility="private", show_progress="minimal"
        )
        stop.click(_stopped, [story], [story], cancels=[telling], queue=False, api_visibility="private")
    blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=AT_ONCE, api_open=False)
    return blocks


def _gallery(gr: Any) -> Any:
    """Where a user puts images."""
    return gr.Gallery(
        label="Pictures, if it is about some",
        file_types=[".png", ".jpg", ".jpeg", ".webp"],
        sources=["upload", "clipboard"],
        interactive=True,
        height=180,
        buttons=[],
    )


def _uploaded(files: "list[tuple[str, str | None]] | None") -> list[HashedImage]:
    """Raises UserError for too many, or what is no picture."""
    if len(files or []) > MAX_PICTURES:
        raise UserError(f"{len(files or [])} pictures; at most {MAX_PICTURES} can be given")
    pictures = []
    for file, _ in files or []:
        try:
            pictures.append(HashedImage.from_pil(decode(Path(file), max_bytes=MAX_FILE_BYTES)))
        except UserError as error:
            raise UserError(str(error).replace(str(Path(file).parent) + os.sep, "")) from None
    return pictures


async def _told(
    storyteller: Storyteller, text: str, given: Sequence[HashedImage], seed: int
) -> AsyncGenerator[tuple[str, str | None], None]:
    """The story as HTML after every record; last the whole with the file of a page to keep."""
    pictures = {picture.id: picture for picture in given}
    story = Story(Request(id="asked", text=text, image_ids=tuple(pictures)))
    yield await asyncio.to_thread(_html, story, pictures, True), None
    try:
        async with aclosing(storyteller.stream(text, given, seed)) as records:
            async for record, picture in records:
                if picture is not None:
                    pictures[picture.id] = picture
                story = _with(story, record)
                yield await asyncio.to_thread(_html, story, pictures, story.trajectory is None), None
    except UserError:
        yield _html(story, pictures, live=False), None
        raise
    with tempfile.TemporaryDirectory() as folder:  # Gradio keeps a copy of its own
        file = Path(folder) / "story.html"
        file.write_text(await asyncio.to_thread(render, [story], pictures.__getitem__, None), encoding="utf-8")
        yield await asyncio.to_thread(_html, story, pictures, False), str(file)


def _with(story: Story, record: Record) -> Story:
    """The story as far as it is known after one more record."""
    match record:
        case PlanRecord():
            return Story(record.request, record.planner, record.plan)
        case Attempt():
            return Story(story.request, story.planner, story.plan, (*story.attempts, record))
        case Trajectory():
            return Story(record.request, record.planner, record.plan, story.attempts, record)
    return story


def _stopped(html: str | None) -> str:
    return (html or "").replace(f">{BEING_TOLD}<", ">stopped<", 1)


def _html(story: Story, pictures: dict[str, HashedImage], live: bool) -> str:
    return story_html(story, Shots(story.image_ids(), pictures.__getitem__, LIVE_SIDES), live=live)


def _gradio() -> Any:
    """Gradio, told to report nothing.  Raises UserError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise UserError(
            "the demo needs gradio; install it with `uv sync --extra demo` or `pip install 'interleave[demo]'`"
        ) from None
    return gradio
