"""The steering page without a browser: its documents, what its callbacks do, and who may reach its server."""

import asyncio
import csv
import json
import runpy
import socket
import time
from base64 import b64decode, b64encode
from functools import partial
from html import escape
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import unquote

import numpy as np
import odd_names
import pytest
import tiny
from bokeh.document import Document
from bokeh.events import ButtonClick, SelectionGeometry, Tap
from bokeh.models.widgets import Div
from PIL import Image

import saefw_steering_state as states
from saefw import gc
from saefw.errors import UserError
from saefw.experiment.choices import Choice, choices
from saefw.experiment.opened import opened, probabilities
from saefw.steering import Edit
from saefw_steering import page, server
from saefw_steering_work import Newest
from saefw_upload import uploaded


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry on images with odd names, with everything made."""
    return odd_names.made(tmp_path_factory.mktemp("page"))


def html(doc: Document) -> str:
    """Return all texts: what was sent since the page was built stands in `live`."""
    divs: Any = doc.select({"type": Div})
    live: Any = doc.select_one({"name": "live"})
    sent = {name: text for name, text, _ in live.tags[1:] if text is not None} if live else {}
    return "".join(sent.get(div.name, div.text) for div in divs)


class Visitor:
    """Somebody who looks at a page and uses what is on it."""

    def __init__(self, path: Path, choice: Choice) -> None:
        self.doc, self.choice, self.experiment = Document(), choice, opened(choice)
        made = page(self.doc, path)
        assert made is not None and made.steer is not None
        self.steer = made.steer

    def __getitem__(self, name: str) -> Any:
        found = self.doc.select_one({"name": name})
        assert found is not None, name
        return found

    def press(self, name: str) -> None:
        self[name]._trigger_event(ButtonClick(self[name]))

    def feature(self, group: str, i: int) -> int:
        """Return what a card shows."""
        assert self.steer.session is not None
        facts = self.steer.session.columns.groups[group][i].facts
        assert facts is not None
        return facts.feature

    def bars(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        assert self.steer.session is not None
        bars = self.steer.session.w.bars
        return bars.before, bars.after

    def html(self) -> str:
        return html(self.doc)


@pytest.fixture(scope="module")
def choice(path: Path) -> Choice:
    return choices(path)[0]


@pytest.fixture(scope="module")
def page_of_all(path: Path, choice: Choice) -> Visitor:
    return Visitor(path, choice)


@pytest.fixture
def visitor(page_of_all: Visitor) -> Visitor:
    """The first example, untouched; the page is that of the tests before."""
    page_of_all["light"].active = False
    page_of_all.press("guide-turn")
    page_of_all.press("reset-all")
    return page_of_all


def test_the_page_begins_with_the_first_example_untouched(page_of_all: Visitor) -> None:
    visitor = page_of_all
    first = visitor.experiment.first
    assert first is not None
    assert visitor["image"].value == str(first.example)
    assert visitor["target"].value == str(first.target)
    before, after = visitor.bars()
    assert np.array_equal(before, after)
    assert before.sum() == pytest.approx(1)
    assert before.argmax() == first.own
    assert visitor["number-other-0"].value is None


def test_the_first_example_turns_one_class_into_another(visitor: Visitor) -> None:
    first = visitor.experiment.first
    assert first is not None
    visitor.press("next")
    visitor.press("guide-turn")
    before, after = visitor.bars()
    assert [before.argmax(), after.argmax()] == [first.own, first.target]
    # Row by row what is edited is what was stored, and the stage measured what the page shows.
    # A feature of both classes stands in the rows of the image's own.
    rows = [(group, i) for group in ("own", "other", "found") for i in range(4)]
    edited = {visitor.feature(*row): visitor["number-{}-{}".format(*row)].value for row in rows}
    wanted = {feature: first.amount for feature in first.features}
    assert {feature: amount for feature, amount in edited.items() if amount is not None} == wanted
    with visitor.choice.run.store.db() as db:
        stored = db.execute(
            "SELECT label, l.before, l.after FROM edit_logit l JOIN edit USING (unit, edit) WHERE unit = ? "
            "AND example = ? AND role = 'other class' AND chosen_by = 'effect' AND dose = ? AND target = ? "
            "ORDER BY label",
            [visitor.experiment.unit.address, first.example, first.amount, first.target],
        ).fetchnumpy()
    for shown, logits in ((before, stored["before"]), (after, stored["after"])):
        powers = np.exp(np.asarray(logits, dtype=np.float64))
        np.testing.assert_allclose(shown, powers / powers.sum(), atol=1e-5)
    visitor.press("reset-all")
    assert np.array_equal(*visitor.bars())


def test_a_slider_changes_what_is_read_and_its_reset_takes_it_back(visitor: Visitor) -> None:
    before, _ = visitor.bars()
    slider, number = visitor["slider-own-0"], visitor["number-own-0"]
    rest = slider.value
    slider.value = slider.end
    assert number.value == slider.end
    again, after = visitor.bars()
    assert np.array_equal(before, again)
    assert np.abs(after - before).max() > 1e-4
    assert "1 feature edited on all patches" in visitor.html()
    number.value = None  # as when somebody empties the field
    assert slider.value == rest
    assert np.array_equal(*visitor.bars())
    number.value = 1.5
    assert slider.value == 1.5
    visitor.press("reset-own-0")
    assert (slider.value, number.value) == (rest, None)
    assert np.array_equal(*visitor.bars())


@pytest.mark.parametrize(("mode", "neutral"), [("add", 0.0), ("scale", 1.0)])
def test_the_neutral_amount_of_a_mode_changes_nothing(visitor: Visitor, mode: str, neutral: float) -> None:
    visitor["mode-found-0"].value = mode
    assert visitor["slider-found-0"].value == neutral
    visitor["slider-found-0"].value = 2.0
    before, after = visitor.bars()
    assert np.abs(after - before).max() > 1e-4
    visitor["number-found-0"].value = neutral
    before, after = visitor.bars()
    np.testing.assert_allclose(after, before, atol=1e-7)


def test_an_image_that_is_gone_is_told_in_its_place(visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: tiny.TinyImages, index: int) -> Image.Image:
        raise FileNotFoundError("no <such> file")

    visitor.experiment.view.cache_clear()
    monkeypatch.setattr(tiny.TinyImages, "image", gone)
    visitor.press("next")
    key = escape(visitor.experiment.acts.keys[int(visitor["image"].value)])
    assert f"image '{key}' cannot be read (it is missing)".replace("'", "&#x27;") in visitor.html()
    before, after = visitor.bars()
    assert np.array_equal(before, after) and before.sum() == pytest.approx(1)
    monkeypatch.undo()
    visitor.press("guide-turn")
    assert "cannot be read" not in visitor.html()


def test_edits_are_those_of_the_engine_on_the_patches_chosen(visitor: Visitor) -> None:
    experiment, picture = visitor.experiment, visitor["picture"]
    visitor["number-found-0"].value = 3.0
    everywhere = visitor.bars()[1]
    picture._trigger_event(Tap(picture, x=0.5, y=3.5))  # the first patch: row 0 is at the top
    corner: Any = {"type": "rect", "x0": 1.2, "x1": 2.8, "y0": 0.1, "y1": 1.9}
    picture._trigger_event(SelectionGeometry(picture, geometry=corner, final=True))
    chosen = [0, 9, 10, 13, 14]
    feature, example = visitor.feature("found", 0), int(visitor["image"].value)
    edit = Edit(feature, "set", 3.0 * experiment.about[feature].p99, chosen)
    engine = experiment.steerings["patches"].edit(experiment.seen(example).readings["patches"], [edit])
    after = visitor.bars()[1]
    np.testing.assert_allclose(after, probabilities(engine[0]), atol=1e-12)
    assert np.abs(after - everywhere).max() > 1e-6
    assert "5 of 16 patches" in visitor.html()
    picture._trigger_event(Tap(picture, x=0.5, y=3.5))
    assert "4 of 16 patches" in visitor.html()
    visitor.press("all-patches")
    np.testing.assert_array_equal(visitor.bars()[1], everywhere)


def test_images_are_gone_through_and_edits_in_sight_stay(visitor: Visitor) -> None:
    ours = [value for value, _ in visitor["image"].options]
    started, label = visitor["image"].value, visitor["class"].value
    visitor["number-other-1"].value = 2.0
    visitor.press("next")
    assert visitor["image"].value == ours[(ours.index(started) + 1) % len(ours)]
    assert visitor["number-other-1"].value == 2.0
    visitor.press("previous")
    assert visitor["image"].value == started
    other = next(value for value, _ in visitor["class"].options if value != label)
    visitor["class"].value = other
    assert visitor["image"].value not in ours
    assert visitor["target"].value != other
    visitor.press("random")
    assert int(visitor["image"].value) in visitor.experiment.test


def test_the_picture_is_lit_where_a_feature_fires(visitor: Visitor) -> None:
    image = visitor["picture"].renderers[0].data_source
    plain = image.data["image"][0].copy()
    lit = visitor.feature("found", 0)
    visitor["signal"].tags = ["light", 1, lit]
    assert visitor["light"].active and f'<button class="pick" data-light="{lit}"' in visitor.html()
    assert not np.array_equal(image.data["image"][0], plain)
    texts = visitor["picture"].renderers[2].data_source.data["value"]
    values = visitor.experiment.seen(int(visitor["image"].value)).patch_ps[:, lit]
    assert [text.endswith(" 0.00") for text in texts] == [f"{v:.2f}" == "0.00" for v in values / values.max()]
    visitor["light"].active = False
    assert np.array_equal(image.data["image"][0], plain)


def test_names_from_files_are_text_and_never_html(visitor: Visitor) -> None:
    visitor.press("guide-turn")
    shown = visitor.html()
    for name in visitor.experiment.classes:
        assert name not in shown or name == escape(name)
    assert "<i>tiny-" not in shown
    assert escape(visitor.experiment.classes[0]) in shown
    assert escape("<i>tiny-") in shown


def test_two_visitors_share_the_models_and_nothing_else(path: Path, choice: Choice, visitor: Visitor) -> None:
    one, two = visitor, Visitor(path, choice)
    assert opened(choices(path)[0]) is one.experiment
    untouched = two.bars()[1]
    one.press("guide-turn")
    assert np.array_equal(two.bars()[1], untouched)
    two.press("next")
    two["number-own-0"].value = 3.0
    edited = one.bars()[1]
    one.press("reset-all")
    one.press("guide-turn")
    assert np.array_equal(one.bars()[1], edited)


def test_another_dataset_is_another_experiment(path: Path, choice: Choice) -> None:
    visitor = Visitor(path, choice)
    select = visitor["dataset"]
    assert len(select.options) == 2
    select.value = next(value for value, _ in select.options if value != select.value)
    assert [name for _, name in visitor["class"].options] == list(tiny.TinyImages.classes)
    assert np.array_equal(*visitor.bars())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (odd_names.REGISTRY.replace("\n  steer:", "\n  #"), "has no stage with use: steer"),
        (odd_names.REGISTRY, "run <code>saefw run {path}</code> first"),
        (
            odd_names.REGISTRY.replace("use: topk", "use: '<b>topk'"),
            "no plugin brings &#x27;&lt;b&gt;topk&#x27;; did you mean &#x27;topk&#x27;?",
        ),
        (None, "{path}"),
    ],
)
def test_where_there_is_nothing_to_steer_the_page_says_what_to_do(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "registry.yaml").write_text(text.replace("odd-set", "tiny-set"))
    doc = Document()
    page(doc, tmp_path / "registry.yaml")
    assert list(doc.select({"name": "nothing"}))
    shown = html(doc)
    assert said.replace("{path}", str(tmp_path / "registry.yaml")) in shown
    assert "<b>" not in shown
    assert not (tmp_path / "runs").exists()


# Tornado drops the socket that finds its port taken.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
def test_the_server_is_for_this_machine_and_its_own_pages_alone(path: Path) -> None:
    from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
    from tornado.websocket import websocket_connect

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = server(path, port)
    ours.start()

    async def visit() -> None:
        answer = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{port}/steering")
        text = answer.body.decode()
        assert "saefw steering" in text
        assert "static/js/bokeh" in text
        assert "https://" not in text
        request = HTTPRequest(f"ws://127.0.0.1:{port}/steering/ws", headers={"Origin": "http://elsewhere.example"})
        with pytest.raises(HTTPClientError, match="403"):
            await websocket_connect(request)
        # All of 127/8 is this machine: a server that listens everywhere would answer here.
        with pytest.raises(OSError):
            await asyncio.wait_for(asyncio.open_connection("127.0.0.2", port), 5)

    try:
        ours.io_loop.run_sync(visit)
        with pytest.raises(UserError, match=f"cannot listen on port {port} .*--port {port + 1}"):
            server(path, port)
    finally:
        ours.stop()
        ours.io_loop.close(all_fds=True)


def test_steps_are_undone_and_done_again(visitor: Visitor) -> None:
    _, untouched = visitor.bars()
    visitor["number-own-0"].value = 2.0
    first = visitor.bars()[1]
    visitor["number-other-0"].value = 2.0
    second = visitor.bars()[1]
    visitor.press("undo")
    np.testing.assert_array_equal(visitor.bars()[1], first)
    visitor.press("undo")
    np.testing.assert_array_equal(visitor.bars()[1], untouched)
    visitor.press("redo")
    visitor.press("redo")
    np.testing.assert_array_equal(visitor.bars()[1], second)
    assert visitor["redo"].disabled and not visitor["undo"].disabled


def test_a_saved_edit_comes_back_on_the_page_and_in_sql(visitor: Visitor, path: Path) -> None:
    visitor.press("guide-turn")
    turned = visitor.bars()[1]
    visitor["save-name"].value = "<b>turn</b>"
    visitor.press("save")
    unit = visitor["saved"].value
    assert [name for _, name in visitor["saved"].options] == ["saved edits …", "<b>turn</b>"]
    store = visitor.choice.run.store
    store.rebuild()  # found by its folder alone
    with store.db() as db:
        assert db.execute("SELECT unit, example FROM saved_edit").fetchall() == [
            (unit, visitor.experiment.guides[0].example)
        ]
        after = db.execute("SELECT after FROM saved_class WHERE unit = ? ORDER BY label", [unit]).fetchall()
    np.testing.assert_allclose([share for (share,) in after], turned, atol=1e-12)
    assert unit not in {spare.address for spare in gc.find([path]).spare}
    visitor["save-name"].value = "<b>turn</b>"
    visitor["number-own-0"].value = 0.5
    visitor.press("save")
    assert "there is an edit &#x27;&lt;b&gt;turn&lt;/b&gt;&#x27; already" in visitor.html()
    visitor.press("reset-all")
    visitor["saved"].value = ""
    visitor["saved"].value = unit
    np.testing.assert_allclose(visitor.bars()[1], turned, atol=1e-12)
    visitor.press("delete")
    assert [name for _, name in visitor["saved"].options] == ["no saved edits yet"]


def test_a_link_holds_the_state_and_a_false_one_is_refused(visitor: Visitor) -> None:
    visitor.press("guide-turn")
    session = visitor.steer.session
    assert session is not None
    state = session.state()
    assert visitor["live"].tags[0] == f"?state={states.written(state)}"
    assert states.read(unquote(states.written(state))) == state
    for text in ("{}", "[]", '{"sae": "../../x", "probe": "000000000000"}', "x" * 9000):
        with pytest.raises(UserError, match="so the page starts anew"):
            states.read(text)


def test_an_edit_is_exported_and_its_lines_of_python_repeat_it(
    visitor: Visitor, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor.press("guide-turn")
    before, after = visitor.bars()
    given = {}
    for kind in ("csv", "json", "png", "svg"):
        visitor.press(f"export-{kind}")
        name, _, data = visitor["file"].tags
        assert name == f"edit.{kind}"
        given[kind] = b64decode(data)
    header, *rows = csv.reader(given["csv"].decode().splitlines())
    assert header == ["class", "before", "after", "change"] and [row[0] for row in rows] == visitor.experiment.classes
    np.testing.assert_allclose(np.array([row[1:3] for row in rows], dtype=float).T, [before, after], atol=1e-9)
    told = json.loads(given["json"])
    assert [one["after"] for one in told["classes"].values()] == pytest.approx(after.tolist())
    assert Image.open(BytesIO(given["png"])).format == "PNG" and b"<svg" in given["svg"]
    lines = told["python"].replace("image.edit(", "edited = image.edit(")
    (tmp_path / "again.py").write_text(lines)
    monkeypatch.chdir(path.parent)
    again = runpy.run_path(str(tmp_path / "again.py"))["edited"]
    found = [again.probabilities[name] for name in visitor.experiment.classes]
    np.testing.assert_allclose(found, after, atol=1e-5)


@pytest.mark.parametrize(("client", "public", "shown"), [
    ("127.0.0.1", False, True), ("::1", False, True), ("10.0.0.7", False, False), ("10.0.0.7", True, True),
])  # fmt: skip
def test_clients_from_elsewhere_are_refused_unless_it_is_public(
    path: Path, client: str, public: bool, shown: bool
) -> None:
    """As under `bokeh serve steering`, which listens on all addresses by itself."""
    doc = Document()
    context = SimpleNamespace(request=SimpleNamespace(remote_ip=client, arguments={}), destroyed=False)
    doc._session_context = cast(Any, lambda: context)
    made = page(doc, path, public)
    assert (made is not None) == shown
    assert (f"This page is for its own machine, and not for {client}." in html(doc)) != shown


def test_an_image_of_ones_own_is_read_in_memory(visitor: Visitor) -> None:
    file = BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "PNG")
    session = visitor.steer.session
    assert session is not None
    session.bring(b64encode(file.getvalue()).decode())
    assert session.example is None and "your image" in visitor.html()
    visitor["number-found-0"].value = 2.0
    before, after = visitor.bars()
    assert after.sum() == pytest.approx(1) and np.abs(after - before).max() > 0
    with pytest.raises(UserError) as caught:
        uploaded(b64encode(b"GIF89a").decode())
    assert str(caught.value) == "that is no image that can be read (there are: JPEG, PNG, WEBP)"


def test_of_the_wishes_of_a_drag_the_newest_is_carried_out_and_none_that_is_stale() -> None:
    asked, begun = 40, list[int]()
    shown: list[Any] = []

    async def drag() -> None:
        loop = asyncio.get_running_loop()
        doc: Any = SimpleNamespace(
            session_context=SimpleNamespace(destroyed=False),
            add_next_tick_callback=lambda call: loop.call_soon(lambda: asyncio.ensure_future(called(call))),
        )
        newest = Newest(doc, shown.append)
        newest.open = True

        def job(wish: int) -> int:
            begun.append(wish)
            time.sleep(0.05)
            return wish

        for wish in range(asked):
            newest.ask(partial(job, wish), shown.append)
            await asyncio.sleep(0.002)
        while shown[-1:] != [asked - 1]:
            await asyncio.sleep(0.01)

    async def called(call: Any) -> None:
        if asyncio.iscoroutine(made := call()):
            await made

    asyncio.run(asyncio.wait_for(drag(), 20))
    assert begun == shown == sorted(set(begun)) and len(begun) < asked / 4


def test_a_feature_is_called_what_people_call_it(visitor: Visitor) -> None:
    feature = visitor.feature("found", 0)
    visitor.experiment.note(feature, "a <b>loop</b>")
    visitor.press("next")
    assert escape("a <b>loop</b>") in visitor.html() and "a <b>loop</b>" not in visitor.html()
    visitor.experiment.note(feature, "")


def test_an_edit_may_go_straight_into_the_probe(visitor: Visitor) -> None:
    experiment = visitor.experiment
    (place,) = experiment.direct
    visitor["place"].active = int(place == "cls")
    visitor["number-found-0"].value = 3.0
    through = visitor.bars()[1].copy()
    visitor["directly"].active = True
    seen, feature = experiment.seen(int(visitor["image"].value)), visitor.feature("found", 0)
    of, reading = experiment.steerings[place], seen.readings[place]
    change = of.change(reading, [Edit(feature, "set", 3.0 * experiment.about[feature].p99)])
    np.testing.assert_allclose(visitor.bars()[1], probabilities(of.directly(reading, change)[0]), atol=1e-12)
    assert np.abs(visitor.bars()[1] - through).max() > 1e-6
    visitor["directly"].active, visitor["place"].active = False, 0
