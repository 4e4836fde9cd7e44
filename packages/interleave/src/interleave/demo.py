"""A page on which a user asks for a story, which appears step by step (needs the package gradio).

By default it listens on this machine only; on another address it asks for the token in INTERLEAVE_DEMO_TOKEN.  Neither
the server nor the browser fetches anything from elsewhere, and nothing is reported to anyone.
"""

import asyncio
import hmac
import os
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from imgen_common import page
from imgen_common.errors import UserError
from imgen_common.images import decode
from interleave.pages.images import PageImages
from interleave.pages.run import render_stories
from interleave.pages.story import STYLE, StoryView, render_story
from interleave.pages.words import IN_PROGRESS
from interleave.protocols import HashedImage
from interleave.records import Attempt, PlanRecord, Record, Request, Trajectory
from interleave.serve import listener_url, local_hosts, open_listener, required_token

if TYPE_CHECKING:
    import gradio
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN = "INTERLEAVE_DEMO_TOKEN"
"""Environment variable that holds the token."""
MAX_IMAGES = 8
MAX_FILE_BYTES = 32 * 2**20
MAX_CONNECTIONS, HEAD_SECONDS = 512, 10.0
"""Open connections, and seconds for the head of a request."""
MAX_WAITING = 16
"""Requests that may wait; further ones are refused."""
MAX_CONCURRENT = 4
"""Stories that are made at the same time."""
MAX_SEED = 2**63
"""A seed is below it, as a run's configuration can be read again."""
LIVE_SIDES = (384, 256)
"""Longest sides of large images while the story is made; the page to download has them larger."""
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'"
NARROW = ".story { --pic: 20rem; } h1 { font-size: 1.5rem; font-weight: 700; }"
EXAMPLES = (
    "draw a yellow circle, then make it red, then add a blue square below it",
    "draw two yellow triangles",
    "draw a cyan cross, then make it purple",
)


class StoryStreamer(Protocol):
    """What makes the stories."""

    def stream(
        self, text: str, images: Sequence[HashedImage], seed: int
    ) -> AsyncGenerator[tuple[Record, HashedImage | None], None]:
        """The records of one story, each when it is complete, an attempt's with its image.

        Raises UserError for what the user can mend.  Closed early, it stops the work.
        """


def serve_demo(make: Callable[[], StoryStreamer], host: str, port: int, allowed_hosts: Sequence[str] = ()) -> None:
    """Serves the page until interrupted.  make: called when all else is in order, as it may load models.

    Raises UserError if the extra is missing, if the address cannot be had, or without a token where others reach it.
    """
    token = required_token(host, TOKEN)
    with open_listener(host, port) as listener:  # before all that takes long
        _import_gradio()
        from interleave.serve.connections import build_limited_server

        app = create_demo_app(build_page(make()), token, host, allowed_hosts)
        print(listener_url(listener), flush=True)
        server = build_limited_server(
            app, MAX_CONNECTIONS, HEAD_SECONDS, log_level="warning", timeout_graceful_shutdown=2
        )
        server.run(sockets=[listener])


def create_demo_app(
    blocks: "gradio.Blocks", token: str | None, host: str = "127.0.0.1", allowed_hosts: Sequence[str] = ()
) -> "FastAPI":
    """The page as a web application: behind the token, or without one for requests to this machine's own names.

    host: the address it listens on.  allowed_hosts: further names.
    """
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    gr = _import_gradio()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Headers)
    if token is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=local_hosts(host, allowed_hosts), www_redirect=False)

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
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
            **{f"button_primary_background_fill{end}": "*primary_600" for end in ("", "_dark")},  # text of 4.5 to 1
            **{f"button_primary_background_fill_hover{end}": "*primary_700" for end in ("", "_dark")},
        ),
        head=f"<style>{page.COLORS}\n.story-live {{ {page.STYLE}{STYLE}{NARROW} }}</style>",
    )
    return app


class _Headers:
    """Adds headers that keep the browser from fetching anything from elsewhere."""

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def send_more(message: "Message") -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        await self._app(scope, receive, send_more)


def build_page(streamer: StoryStreamer) -> "gradio.Blocks":
    """The components of the page and what its buttons do.  Raises UserError if the extra is missing."""
    gr = _import_gradio()

    async def generate(text: str, files: "list[tuple[str, str | None]] | None", seed: int | None) -> AsyncIterator[Any]:
        html = ""
        try:
            images = await asyncio.to_thread(_read_uploads, files)
            if seed is None or not 0 <= seed < MAX_SEED:
                raise UserError(f"the seed must be a whole number of at least 0, and below {MAX_SEED}")
            async with aclosing(_stream_html(streamer, text, images, seed)) as pages:
                async for html, file in pages:
                    yield html, gr.DownloadButton(value=file, visible=file is not None)
        except UserError as error:
            # below the story as far as it came: Gradio's own message would stay over the next one
            yield f'{html}<p role="alert">{page.text(str(error))}</p>', gr.DownloadButton(visible=False)

    with gr.Blocks(title="interleave", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        gr.Markdown("# A story in images and words")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                text = gr.Textbox(label="Request", lines=4, max_lines=12, placeholder=EXAMPLES[0], autofocus=True)
                files = _gallery(gr)
                seed = gr.Number(label="Seed", value=0, precision=0, minimum=0)
                with gr.Row():
                    start = gr.Button("Generate", variant="primary")
                    stop = gr.Button("Stop")
                gr.Examples([[example] for example in EXAMPLES], [text], label="Examples")
            with gr.Column(scale=2, min_width=320):
                story = gr.HTML(apply_default_css=False, js_on_load=None, elem_classes=["story-live"])
                download = gr.DownloadButton("Download the story as one HTML page", visible=False)
        generation = start.click(
            generate, [text, files, seed], [story, download], api_visibility="private", show_progress="hidden"
        )  # the story says how far it is; Gradio's own sign would call a stopped one an error
        stop.click(_mark_stopped, [story], [story], cancels=[generation], queue=False, api_visibility="private")
    blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=MAX_CONCURRENT, api_open=False)
    return blocks


def _gallery(gr: Any) -> Any:
    return gr.Gallery(
        label="Images (optional)",
        file_types=[".png", ".jpg", ".jpeg", ".webp"],
        sources=["upload", "clipboard"],
        interactive=True,
        height=180,
        buttons=[],
    )


def _read_uploads(files: "list[tuple[str, str | None]] | None") -> list[HashedImage]:
    """The images.  Raises UserError for too many, and for a file that is no image."""
    if len(files or []) > MAX_IMAGES:
        raise UserError(f"{len(files or [])} images; at most {MAX_IMAGES} can be given")
    images = []
    for file, _ in files or []:
        try:
            images.append(HashedImage.from_pil(decode(Path(file), max_bytes=MAX_FILE_BYTES)))
        except UserError as error:
            raise UserError(str(error).replace(str(Path(file).parent) + os.sep, "")) from None
    return images


async def _stream_html(
    streamer: StoryStreamer, text: str, given: Sequence[HashedImage], seed: int
) -> AsyncGenerator[tuple[str, str | None], None]:
    """The story as HTML after every record; at last the whole story, with the file of a page to download."""
    images = {image.id: image for image in given}
    story = StoryView(Request(id="asked", text=text, image_ids=tuple(images)))
    yield await asyncio.to_thread(_story_html, story, images, True), None
    try:
        async with aclosing(streamer.stream(text, given, seed)) as records:
            async for record, image in records:
                if image is not None:
                    images[image.id] = image
                story = _add_record(story, record)
                yield await asyncio.to_thread(_story_html, story, images, story.trajectory is None), None
    except UserError:
        yield _story_html(story, images, live=False), None
        raise
    with tempfile.TemporaryDirectory() as folder:  # Gradio keeps a copy of its own
        file = Path(folder) / "story.html"
        file.write_text(await asyncio.to_thread(render_stories, [story], images.__getitem__, None), encoding="utf-8")
        yield await asyncio.to_thread(_story_html, story, images, False), str(file)


def _add_record(story: StoryView, record: Record) -> StoryView:
    """The story as far as it is known after one more record."""
    match record:
        case PlanRecord():
            return StoryView(record.request, record.planner, record.plan)
        case Attempt():
            return StoryView(story.request, story.planner, story.plan, (*story.attempts, record))
        case Trajectory():
            return StoryView(record.request, record.planner, record.plan, story.attempts, record)
    return story


def _mark_stopped(html: str | None) -> str:
    return (html or "").replace(f">{IN_PROGRESS}<", ">stopped<")


def _story_html(story: StoryView, images: dict[str, HashedImage], live: bool) -> str:
    return render_story(story, PageImages(story.image_ids(), images.__getitem__, LIVE_SIDES), live=live)


def _import_gradio() -> Any:
    """Gradio, without its reports to others.  Raises UserError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise UserError("the demo needs gradio; run: uv pip install gradio") from None
    return gradio
