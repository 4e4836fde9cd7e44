"""The page of stories: it stands alone, shows the story first and how it came about, and escapes what others wrote."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from browser import find_faults
from hypothesis import given
from hypothesis import strategies as st
from pages import Page
from PIL import Image

from imgen_common.errors import UserError
from imgen_common.page import environment, text
from interleave.loop import requests as request_files
from interleave.pages import TEMPLATES
from interleave.pages import run as run_pages
from interleave.pages.images import PIXELS, SIDES, SMALL, PageImages
from interleave.pages.run import render_stories, write_report
from interleave.pages.story import StoryView
from interleave.pages.words import (
    ATTEMPT_STATUS,
    FAILURES,
    STORY_STATUS,
    explain_reasoning,
    format_seconds,
    word_changes,
)
from interleave.protocols import FailureKind, HashedImage
from interleave.records import (
    Attempt,
    AttemptStatus,
    GeneratorInfo,
    Plan,
    PlannerRecord,
    PlanRecord,
    PlanStep,
    Request,
    Scores,
    Spent,
    Trajectory,
    TrajectoryStatus,
)
from interleave.storage.images import ImageStore
from interleave.storage.trace import Trace

EVIL = '<script>alert("1")</script> & \'quotes\' "onload="x'
RUN = Path("runs") / "my run"


class Album(dict[str, HashedImage]):
    """Images by id, as a store that cannot lack one silently."""

    def draw(self, seed: int, size: tuple[int, int] = (32, 32)) -> str:
        """An image of random squares, made and kept."""
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = HashedImage.from_pil(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))
        self[picture.id] = picture
        return picture.id

    def get_image(self, image_id: str) -> HashedImage:
        """As `ImageStore.get`."""
        if image_id not in self:
            raise UserError("no such picture <b>")
        return self[image_id]


def attempt(step: int, number: int, image: str | None, before: str | None = None, **changes: object) -> Attempt:
    fields = {
        "trajectory_id": "r",
        "step": step,
        "attempt": number,
        "op": "edit" if before else "t2i",
        "source_ids": (before,) if before else (),
        "before_id": before,
        "original_prompt": "add a blue square",
        "prompt_used": "add a blue square",
        "seed": 4711,
        "generator": GeneratorInfo(id="some generator", params={"num_inference_steps": 16}),
        "image_id": image,
        "verdict": True,
        "refined_prompt": "add a blue square",
        "reasoning": "as asked",
        "raw": "raw words",
        "critic_tries": 1,
        "timings": {"generate": 1.25, "critic": 0.5},
        "status": "accepted",
    }
    return Attempt.model_validate(fields | changes)


def told(album: Album, words: str = "two shapes", story_id: str = "r", seed: int = 0, size: int = 32) -> StoryView:
    """A finished story of two images, the second at its second attempt, and a text."""
    first, bad, good = (album.draw(10 * seed + i, (size, size)) for i in range(3))
    better = "add a solid blue square"
    plan = Plan(
        steps=(
            PlanStep(index=1, prompt="a red circle", text=f"First {words}"),
            PlanStep(index=2, prompt="add a blue square", text=f"Second {words}"),
            PlanStep(index=3, text=f"The end of {words}"),
        ),
        reasoning="thought before",
    )
    planner = PlannerRecord(model="some planner", template="own", template_hash="abc", raw="raw plan")
    refused = {"verdict": False, "status": "rejected", "refined_prompt": better, "reasoning": "too pale"}
    scores = Scores(semantics=9, quality=7.5, judge_id="some judge")
    attempts = (
        attempt(1, 1, first),
        attempt(2, 1, bad, first, **refused),
        attempt(
            2, 2, good, first, prompt_used=better, refined_prompt=better, scores=scores, success_probability=0.0004
        ),
    )
    request = Request(id=story_id, text=words)
    trajectory = Trajectory(
        id=story_id,
        request=request,
        planner=planner,
        plan=plan,
        selected={1: 1, 2: 2},
        status="complete",
        spent=Spent(generations=3, critic_calls=3, planner_calls=1, seconds=65),
        versions={"interleave": "9.8.7"},
    )
    return StoryView(request, planner, plan, attempts, trajectory)


def ended(story: StoryView, status: str, error: str, attempts: int, selected: dict[int, int]) -> StoryView:
    """`story`, stopped early."""
    assert story.trajectory is not None
    changes = {"status": status, "error": error, "selected": selected}
    return StoryView(
        story.request,
        story.planner,
        story.plan,
        story.attempts[:attempts],
        story.trajectory.model_copy(update=changes),
    )


def page_of(stories: list[StoryView], album: Album) -> tuple[str, Page]:
    html = render_stories(stories, album.get_image, RUN)
    return html, Page(html)


def drawings(page: Page) -> list[str]:
    """Descriptions of the images, in the order of the page."""
    return [str(values["aria-label"]) for tag, values in page.elements if tag == "svg"]


def words_of(html: str) -> str:
    return Page(html).text


@pytest.mark.parametrize("num", [1, 3])
def test_the_page_stands_alone(num: int) -> None:
    album = Album()
    html, page = page_of([told(album, f"story {i}", f"r{i}", i) for i in range(num)], album)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    for outside in ("http:", "https:", "@import", "url("):
        assert outside not in html
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert 'name="viewport"' in html
    assert all(drawings(page))


@pytest.mark.slow
def test_the_page_reads_well_on_a_phone_and_in_the_dark(browser: Any, tmp_path: Path) -> None:
    album = Album()
    html, _ = page_of([told(album, f"story {i}", f"r{i}", i) for i in range(3)], album)
    (tmp_path / "report.html").write_text(html.replace("<details", "<details open"), encoding="utf-8")
    assert find_faults(browser, (tmp_path / "report.html").as_uri()) == []


def test_every_image_is_in_the_page_once() -> None:
    album = Album()
    stories = [told(album, f"story {i}", f"r{i}", i) for i in range(3)]
    _, page = page_of(stories, album)
    data = [values["href"] for tag, values in page.elements if tag == "image"]
    assert len(data) == len(set(data)) == len(album)
    names = {values["id"] for tag, values in page.elements if tag == "image"}
    uses = [str(values["href"])[1:] for tag, values in page.elements if tag == "use"]
    assert len(uses) > len(names)
    assert set(uses) <= names


def test_all_names_in_the_page_are_different_and_links_lead_somewhere() -> None:
    album = Album()
    _, page = page_of([told(album, f"story {i}", f"r{i}", i) for i in range(3)], album)
    names = [values["id"] for _, values in page.elements if "id" in values]
    assert len(names) == len(set(names))
    links = [str(values["href"]) for tag, values in page.elements if tag == "a"]
    assert {link[1:] for link in links if link != "#"} == {"s1", "s2", "s3"}


def test_the_story_comes_first_and_how_it_came_about_is_folded() -> None:
    album = Album()
    _, page = page_of([told(album, "WORDS")], album)
    places = [page.visible.index(part) for part in ("First WORDS", "Second WORDS", "The end of WORDS")]
    assert places == sorted(places)
    assert "3 images · 1 min 05 s" in page.visible
    assert "accepted at attempt 2 of 2" in page.visible
    hidden = (
        "too pale",
        "4711",
        "thought before",
        "raw plan",
        "raw words",
        "some judge",
        "9.8.7",
        "0.0004",
    )
    for word in hidden:
        assert word not in page.visible
        assert word in page.text
    assert drawings(page)[0] == "First WORDS"
    assert "generator 1.2 s, critic 0.5 s" in page.text


def test_prompts_are_shown_with_what_changed() -> None:
    album = Album()
    html, _ = page_of([told(album)], album)
    assert html.count("add a <ins>solid</ins> blue square") == 2  # the critic's, and the one used next
    assert "Prompt, with changes to the plan" in html


def test_a_prompt_that_the_generator_revised_is_shown_as_it_drew_it() -> None:
    album = Album()
    story = told(album)
    first = story.attempts[0].model_copy(update={"revised_prompt": "add a blue square in oil"})
    html, _ = page_of([StoryView(story.request, story.planner, story.plan, (first, *story.attempts[1:]))], album)
    assert "Prompt as the generator revised it" in html
    assert "<ins>in oil</ins>" in html


def test_images_before_the_first_are_not_shown() -> None:
    album = Album()
    white = album.draw(99)
    story = told(album)
    first = story.attempts[0].model_copy(update={"before_id": white})
    html, _ = page_of([StoryView(story.request, story.planner, story.plan, (first, *story.attempts[1:]))], album)
    assert white[:20] not in html


@pytest.mark.parametrize("num", [1, 2])
def test_what_others_wrote_is_escaped_everywhere(num: int) -> None:
    album = Album()
    picture = album.draw(1)
    step = PlanStep(index=1, name=EVIL, instruction=EVIL, prompt=EVIL, text=EVIL)
    wild = {"original_prompt": EVIL, "prompt_used": EVIL + " x", "refined_prompt": EVIL + " y", "reasoning": EVIL}
    wild["revised_prompt"] = EVIL + " z"
    generator = GeneratorInfo(id=EVIL, params={EVIL: EVIL})
    scores = Scores(semantics=1, quality=1, judge_id=EVIL)
    one = attempt(1, 1, picture, generator=generator, raw=EVIL, error=EVIL, scores=scores, timings={EVIL: 1.0}, **wild)
    two = one.model_copy(update={"attempt": 2})
    planner = PlannerRecord(model=EVIL, template=EVIL, template_hash=EVIL, raw=EVIL, error=EVIL)
    stories = []
    for i in range(num):
        request = Request(id=EVIL + str(i), text=EVIL, image_ids=(picture,))
        trajectory = Trajectory(
            id=request.id,
            request=request,
            planner=planner,
            plan=Plan(steps=(step,), reasoning=EVIL),
            selected={1: 2},
            status="internal_error",
            error=EVIL,
            versions={EVIL: EVIL},
        )
        stories.append(StoryView(request, planner, trajectory.plan, (one, two), trajectory))
    html = render_stories(stories, album.get_image, Path(EVIL))
    page = Page(html)
    assert "<script" not in html
    known = {"html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "h3", "h4", "p", "span"}
    known |= {"article", "section", "div", "svg", "image", "use", "details", "summary", "dl", "dt", "dd", "bdi", "pre"}
    known |= {"table", "thead", "tbody", "tr", "th", "td", "footer", "code", "figure", "figcaption", "i", "small"}
    known |= {"ins", "del", "nav", "a", "ul", "li"}
    assert set(page.tags) <= known
    assert not [values for _, values in page.elements if any(name.startswith("on") for name in values)]
    assert page.text.count(EVIL) > 15
    assert EVIL in drawings(page)


@given(st.text())
def test_any_text_is_text_and_hides_nothing(value: str) -> None:
    page = Page(f'<p title="{text(value)}">{text(value)}</p>')
    assert page.tags == ["p"]
    for shown in (page.text, str(page.elements[0][1]["title"])):
        assert not [c for c in shown if c in "\u202e\u2066\x00\x1b\r"]
        back = re.sub("⟨U\\+([0-9A-F]{4})⟩", lambda found: chr(int(found[1], 16)), shown)
        assert back == re.sub("⟨U\\+([0-9A-F]{4})⟩", lambda found: chr(int(found[1], 16)), value.replace("\r\n", "\n"))
    text(value).encode()


@pytest.mark.parametrize(
    "words", ["قلب أحمر \u202e evil", "वृत्त बनाओ", "画一个红色的圆", "👩‍👩‍👧 ребёнок", "a\x00b\x1b[31m"]
)
def test_any_script_is_readable(words: str) -> None:
    album = Album()
    html, page = page_of([told(album, words)], album)
    assert "\u202e" not in html
    assert "\x00" not in html
    assert re.sub("[\u202e\x00\x1b]", "", words) in re.sub(r"⟨U\+\w{4}⟩", "", page.text)
    html.encode()


def word_diff(old: str, new: str) -> str:
    """The changes as a page shows them."""
    macros: Any = environment(TEMPLATES).get_template("attempts.html.jinja").module
    return str(macros.changed(word_changes(old, new)))


PIECES = st.lists(st.sampled_from(["red", "blue", "a", ",", ".", "圆", "形", "<b>", "&"]), max_size=12).map(" ".join)


@given(PIECES, PIECES)
def test_a_diff_holds_both_texts(old: str, new: str) -> None:
    html = word_diff(old, new)
    without = {tag: words_of(re.sub(f"<{tag}>.*?</{tag}>", "", html)) for tag in ("del", "ins")}
    assert without["del"].split() == new.split()
    assert without["ins"].split() == old.split()
    assert ("<ins>" in html or "<del>" in html) == (old.split() != new.split())


@given(st.text(max_size=60))
def test_equal_texts_have_no_diff(value: str) -> None:
    assert word_diff(value, value) == text(value) or "\r\n" in value


def test_a_diff_goes_word_by_word() -> None:
    assert word_diff("a red circle", "a blue circle") == "a <del>red</del> <ins>blue</ins> circle"
    assert word_diff("a circle.", "a circle, solid.") == "a circle<ins>, solid</ins>."
    assert word_diff("画红圆", "画蓝圆") == "画<del>红</del> <ins>蓝</ins>圆"


def test_a_diff_of_long_prompts_is_quick() -> None:
    long = " ".join(f"word{i % 7}" for i in range(20_000))
    assert word_diff(long, "." * 20_000).startswith("<del>")


ENDED: list[tuple[str, str, int, dict[int, int], str]] = [
    ("generator_failed", "step 2: out_of_memory: 12 GiB", 1, {1: 1}, "step 2: out of memory: 12 GiB"),
    ("critic_failed", "step 2: unreachable: refused", 2, {1: 1, 2: 1}, "step 2: no connection: refused"),
    ("budget_exhausted", "3 pictures were drawn", 1, {1: 1}, "3 pictures were drawn"),
    ("internal_error", "ValueError: x", 0, {}, "ValueError: x"),
]


@pytest.mark.parametrize(("status", "error", "attempts", "selected", "said"), ENDED)
def test_a_story_that_ended_early_says_why_and_how_to_go_on(
    status: str, error: str, attempts: int, selected: dict[int, int], said: str
) -> None:
    album = Album()
    _, page = page_of([ended(told(album), status, error, attempts, selected)], album)
    assert said in page.text
    assert "interleave batch --resume 'runs/my run' --retry" in page.text
    assert "not reached" in page.text


@pytest.mark.parametrize(
    ("reasoning", "words"),
    [
        (
            "before: red circle d k. after: (red circle) d k, (red square) d k. want: (red circle) asked, "
            "(blue square) wrong. wrong things",
            "the image shows red circle and red square, but the step asks for red circle and blue square",
        ),
        (
            "before: nothing. after: nothing. want: (red circle) wrong. wrong things",
            "the image shows nothing, but the step asks for red circle",
        ),
        (
            "before: red circle a a. after: (red circle) k k. want: (red circle) asked. moved",
            "the image shows red circle, but something else has moved",
        ),
        (
            "before: nothing. after: (red circle) a a. want: nothing fits. not as asked",
            "the image shows red circle, which does not fit the step",
        ),
        (long := "before: x" + ". after: x" * 9000 + ". want: x" * 9000 + ". Z", long),
        ("The hat is missing. It was asked for.", "The hat is missing. It was asked for."),
        ("before: a. after: b", "before: a. after: b"),
        ("", "the critic gave no reason"),
        (" \n", "the critic gave no reason"),
    ],
)
def test_the_notes_of_the_miniatures_critic_are_shown_in_words(reasoning: str, words: str) -> None:
    assert explain_reasoning(reasoning) == words


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(3.14, "3.1 s"), (59.94, "59.9 s"), (59.97, "1 min 00 s"), (119.7, "2 min 00 s"), (125, "2 min 05 s")],
)
def test_seconds_are_rounded_before_they_are_divided(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown


def test_every_state_has_words() -> None:
    assert set(ATTEMPT_STATUS) == set(get_args(AttemptStatus))
    assert set(STORY_STATUS) == {*get_args(TrajectoryStatus), "unfinished", "waiting"}
    assert set(FAILURES) == set(get_args(FailureKind))


def test_a_failed_attempt_says_so_in_plain_words() -> None:
    album = Album()
    story = told(album)
    failure = {"status": "generator_failed", "verdict": None, "error": "rate_limited: 503"}
    failed = attempt(2, 1, None, story.attempts[0].image_id, **failure)
    story = StoryView(story.request, story.planner, story.plan, (story.attempts[0], failed), story.trajectory)
    _, page = page_of([ended(story, "generator_failed", "step 2: rate_limited: 503", 2, {1: 1})], album)
    assert "the generator failed" in page.text
    assert "the endpoint was too busy after all retries: 503" in page.text
    assert "no image" in page.text


def test_a_request_without_a_plan_has_a_page() -> None:
    album = Album()
    story = told(album)
    planner = PlannerRecord(model="m", template="t", template_hash="h", raw="no json", num_tries=5, error="unreadable")
    trajectory = Trajectory(
        id="r", request=story.request, planner=planner, plan=None, status="planner_failed", error="unreadable"
    )
    _, page = page_of([StoryView(story.request, planner, None, (), trajectory)], album)
    for said in ("Ended without a plan: unreadable", "5 times", "no json"):
        assert said in page.text


@pytest.mark.parametrize(("attempts", "said"), [(0, "not started"), (2, "not finished")])
def test_a_run_that_goes_on_says_so(attempts: int, said: str) -> None:
    album = Album()
    story = told(album)
    plan = story.plan if attempts else None
    _, page = page_of([StoryView(story.request, None, plan, story.attempts[:attempts])], album)
    assert said in page.text
    assert "To continue: interleave batch --resume 'runs/my run'" in page.text
    assert "--retry" not in page.text


def test_a_step_that_no_attempt_passed_says_so() -> None:
    album = Album()
    _, page = page_of([ended(told(album), "complete", "", 2, {1: 1, 2: 1})], album)
    assert "never accepted; attempt 1 of 1 is shown" in page.text


def test_a_missing_image_is_named_and_the_page_is_there() -> None:
    album = Album()
    story = told(album)
    del album[str(story.attempts[2].image_id)]
    html, page = page_of([story], album)
    assert "image missing: no such picture <b>" in page.text
    assert "<b>" not in html


def test_small_images_stay_exact_and_large_ones_become_small() -> None:
    album = Album()
    html, page = page_of([told(album, size=SMALL)], album)
    assert html.count('class="shot pixels"') == len(drawings(page))
    assert "without smoothing" in page.text
    html, page = page_of([told(album, size=1100)], album)
    data = [str(values["href"]) for tag, values in page.elements if tag == "image"]
    assert {_size(uri) for uri in data} == {(1024, 1024)}
    assert all(uri.startswith("data:image/webp") for uri in data)
    assert "at most 1024 pixels per side" in page.text
    assert "'runs/my run/images'" in page.text or "runs/my run/images" in page.text


def _size(uri: str) -> tuple[int, int]:
    import base64
    import io

    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size


def test_the_more_images_the_smaller_they_are() -> None:
    picture = HashedImage.from_pil(Image.new("RGB", (2, 2), "red"))
    sides = [PageImages((f"{i:064x}" for i in range(num)), lambda _: picture).side for num in (3, 60, 200, 700)]
    assert sides == sorted(sides, reverse=True)
    assert all(num * side**2 <= PIXELS for num, side in zip((3, 60, 200), sides, strict=False))
    assert sides[-1] == SIDES[-1]


def test_a_batch_begins_with_an_index_of_all_requests() -> None:
    album = Album()
    stories = [told(album, f"story number {i}", f"r{i}", i) for i in range(5)]
    stories[3] = ended(stories[3], "generator_failed", "step 2: malformed_response: x", 1, {1: 1})
    html, page = page_of(stories, album)
    index = html[html.index("<nav") : html.index("</nav>") + len("</nav>")]
    assert [f"story number {i}" in Page(index).text for i in range(5)] == [True] * 5
    assert [len(re.findall("<use", card)) for card in index.split("</a>")[:-1]] == [2, 2, 2, 1, 2]
    assert "4 complete" in page.text
    assert "1 ended early: the generator failed" in page.text
    assert html.index("<nav") < html.index('id="s1"')


def run_folder(path: Path, album: Album, stories: list[StoryView], keep: Callable[[StoryView], bool]) -> None:
    """A run folder that holds the records of the stories that are to be kept."""
    path.mkdir()
    request_files.save_requests([story.request for story in stories], path)
    store = ImageStore(path / "images")
    with Trace(path) as trace:
        for story in filter(keep, stories):
            name = {"trajectory_id": story.request.id}
            trace.append(PlanRecord(**name, request=story.request, planner=story.planner, plan=story.plan))
            for one in story.attempts:
                store.put(album[str(one.image_id)])
                trace.append(one.model_copy(update=name))
            assert story.trajectory is not None
            trace.append(story.trajectory)


def test_a_run_folder_becomes_a_page(tmp_path: Path) -> None:
    album = Album()
    stories = [told(album, f"story {i}", f"r{i}", i) for i in range(3)]
    run_folder(tmp_path / "run", album, stories, keep=lambda story: story.request.id != "r1")
    assert write_report(tmp_path / "run") == tmp_path / "run" / "report.html"
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    rest = [stories[0], StoryView(stories[1].request), stories[2]]
    assert html == render_stories(rest, album.get_image, tmp_path / "run")
    assert write_report(tmp_path / "run", tmp_path / "elsewhere.html").read_text(encoding="utf-8") == html
    assert "1 not started" in Page(html).text


def test_a_run_of_many_stories_has_several_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_pages, "MAX_STORIES", 2)
    album = Album()
    stories = [told(album, f"story {i}", f"r{i}", i) for i in range(5)]
    run_folder(tmp_path / "run", album, stories, keep=lambda story: True)
    assert write_report(tmp_path / "run") == tmp_path / "run" / "report.html"
    names = ["report.html", "report-2.html", "report-3.html"]
    assert sorted(file.name for file in (tmp_path / "run").glob("*.html")) == sorted(names)
    for number, name in enumerate(names):
        html = (tmp_path / "run" / name).read_text(encoding="utf-8")
        others = [other for other in names if other != name]
        assert [other for other in names if f'href="{other}"' in html] == others
        shown = range(2 * number + 1, min(2 * number + 2, 5) + 1)
        assert f"the stories {shown[0]} to {shown[-1]} of 5" in Page(html).text
        assert [i for i in range(1, 7) if f"story {i - 1}" in Page(html).text] == list(shown)
        assert len(shown) == 1 or all(f'href="#s{i}"' in html and f'id="s{i}"' in html for i in shown)


def test_only_a_run_has_a_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no requests that can be read .*start it again"):
        write_report(tmp_path)
