"""The Explore and Compare tabs without a browser, and what matters most of them in Chromium."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import odd_names
import pytest
import tiny
from bokeh.document import Document
from bokeh.events import ButtonClick, SelectionGeometry
from bokeh.models.widgets import Div
from safetensors.torch import load_file

from saefw import notes
from saefw.index import INDEX
from saefw.stages.steer_charts import SAID
from saefw.store import Store
from saefw_compare import Compare
from saefw_explore import Explore
from saefw_findings import looks
from saefw_steering import page, server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EVIL = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry on images with odd names, with everything made."""
    text = odd_names.REGISTRY.replace("k: 4, expansion: 2, lr: 0.003", "expansion: 2, lr: 0.003, vary: {k: [2, 4]}")
    text = text.replace("lr: 0.01}", "vary: {lr: [0.01, 0.1], weight_decay: [0.0, 1.0]}}")
    text = text.replace("saes: sweep, probes", "saes: sweep, sae: {lowest: nmse}, probes")
    return odd_names.made(tmp_path_factory.mktemp("explore"), text)


@pytest.fixture
def root(path: Path) -> Iterator[Path]:
    """Its store, without a note."""
    yield path.parent / "runs"
    shutil.rmtree(path.parent / "runs" / "notes", ignore_errors=True)


class Visitor:
    """Somebody who looks at the tabs and uses what is on them."""

    def __init__(self, path: Path, tab: int) -> None:
        self.doc = Document()
        page(self.doc, path)
        self["tabs"].active = tab

    def __getitem__(self, name: str) -> Any:
        found = self.doc.select_one({"name": name})
        assert found is not None, name
        return found

    def press(self, name: str) -> None:
        self[name]._trigger_event(ButtonClick(self[name]))

    def html(self) -> str:
        """What is written on the tab that is looked at."""
        tabs = self["tabs"]
        return "".join(div.text for div in tabs.tabs[tabs.active].child.select({"type": Div}))

    def shown(self) -> list[int]:
        """The features that the table shows, in its order."""
        every = np.asarray(self["explore-source"].data["feature"])
        return [int(feature) for feature in every[self["features"].view.filter.indices]]


def rows(root: Path, sql: str, *values: object) -> list[Any]:
    with Store(root).db() as db:
        return db.execute(sql, list(values)).fetchall()


def test_every_feature_is_listed_the_best_detectors_first(path: Path, root: Path) -> None:
    visitor = Visitor(path, 1)
    unit = visitor["explore-sae"].value
    expected = rows(
        root,
        "SELECT feature FROM feature f LEFT JOIN (SELECT feature, max(ap) AS ap FROM class_feature WHERE unit = $1 "
        "GROUP BY feature) b USING (feature) WHERE unit = $1 ORDER BY coalesce(ap, 0) DESC, max DESC, feature",
        unit,
    )
    assert visitor.shown() == [feature for (feature,) in expected]
    assert f"{len(expected)} of {len(expected)} features" in visitor.html()
    assert f"<h1>Feature {expected[0][0]}</h1>" in visitor.html()
    source = visitor["explore-source"].data
    frequency = dict(rows(root, "SELECT feature, frequency FROM feature WHERE unit = ?", unit))
    with np.errstate(divide="ignore"):
        wanted = np.log10([frequency[int(s)] for s in source["feature"]])
    np.testing.assert_allclose(source["x"], np.where(np.isfinite(wanted), wanted, np.nan), rtol=1e-6)


def test_explore_begins_with_the_sae_that_is_steered(path: Path, root: Path) -> None:
    visitor = Visitor(path, 0)
    saes = [sae for sae, _ in visitor["sae"].options]
    assert len(saes) > 1
    for sae in saes:
        visitor = Visitor(path, 0)
        visitor["sae"].value = sae
        visitor["tabs"].active = 1
        ((looked,),) = rows(root, "SELECT DISTINCT sae FROM feature WHERE unit = ?", visitor["explore-sae"].value)
        assert looked == sae


def test_where_nothing_is_steered_the_page_begins_with_what_there_is(root: Path, tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("saefw: 1\nstages: {}\n")
    shutil.copytree(root, tmp_path / "runs")

    def begins() -> int:
        doc = Document()
        page(doc, tmp_path / "registry.yaml")
        tabs: Any = doc.select_one({"name": "tabs"})
        return int(tabs.active)

    assert begins() == 1
    shutil.rmtree(tmp_path / "runs" / "visuals")
    Store(tmp_path / "runs").sync()
    assert begins() == 2


def test_a_box_a_class_a_number_and_words_find_features(path: Path, root: Path) -> None:
    visitor = Visitor(path, 1)
    every, source, scatter = visitor.shown(), visitor["explore-source"].data, visitor["scatter"]
    x, y = np.asarray(source["x"]), np.asarray(source["y"])
    middle = float(np.nanmedian(x))
    box: Any = {"type": "rect", "x0": middle, "x1": 9.0, "y0": -99.0, "y1": 99.0}
    scatter._trigger_event(SelectionGeometry(scatter, geometry=box, final=True))
    assert visitor.shown() == [every[i] for i in range(len(every)) if x[i] >= middle and np.isfinite(y[i])]
    assert 0 < len(visitor.shown()) < len(every)
    visitor["explore-class"].value = "1"
    classes = np.asarray(source["class"])
    assert visitor.shown() == [s for i, s in enumerate(every) if x[i] >= middle and classes[i] == "green & co"]
    visitor.press("explore-all")
    assert visitor.shown() == every
    visitor["explore-search"].value_input = "GREEN"
    assert visitor.shown() == [s for i, s in enumerate(every) if classes[i] == "green & co"]
    visitor["explore-search"].value_input = "1"
    assert visitor.shown() == [s for s in every if str(s).startswith("1")]
    visitor["explore-search"].value = visitor["explore-search"].value_input = "13"
    assert visitor.shown() == [13]
    assert "<h1>Feature 13</h1>" in visitor.html()
    visitor["explore-search"].value_input = "no such thing"
    assert visitor.shown() == [] and f"0 of {len(every)} features" in visitor.html()


def test_the_page_of_a_feature_says_what_the_tables_say(path: Path, root: Path) -> None:
    visitor = Visitor(path, 1)
    unit, feature = visitor["explore-sae"].value, visitor.shown()[2]
    visitor["explore-source"].selected.indices = [2]
    shown = visitor.html()
    assert f"<h1>Feature {feature}</h1>" in shown
    of = unit, feature
    top = rows(root, "SELECT example, score FROM top_example WHERE unit = ? AND feature = ? ORDER BY rank", *of)
    assert shown.count('<figure title="') == shown.count('<img src="data:image/png;base64,') == len(top) > 0
    assert all(f" · {score:.2f}</figcaption>" in shown for _, score in top)
    best = rows(root, "SELECT max(ap) FROM class_feature WHERE unit = ? AND feature = ?", unit, feature)[0][0]
    assert f"<dt>AP</dt><dd>{best:.2f}</dd>" in shown
    bins = visitor["histogram"].renderers[0].data_source.data
    counts = rows(root, "SELECT low, n FROM feature_histogram WHERE unit = ? AND feature = ? ORDER BY low", *of)
    np.testing.assert_allclose(bins["left"], [low for low, _ in counts])
    (sae,) = [look.sae for look in looks(Store(root)) if look.unit == unit]
    w_sd = load_file(root / "train" / sae / "sae.safetensors")["W_dec"].numpy()
    unit_sd = w_sd / np.linalg.norm(w_sd, axis=1, keepdims=True)
    cosine_s = unit_sd @ unit_sd[feature]
    near = [int(s) for s in np.argsort(-cosine_s) if s != feature][:8]
    assert [visitor[f"near-{i}"].label for i in range(8)] == [f"{s} · {cosine_s[s]:.2f}" for s in near]
    visitor.press("near-0")
    assert f"<h1>Feature {near[0]}</h1>" in visitor.html()
    visitor.press("explore-all")
    visitor["explore-source"].selected.indices = [2]
    visitor.press("feature-next")
    assert f"<h1>Feature {visitor.shown()[3]}</h1>" in visitor.html()
    visitor.press("feature-previous")
    visitor.press("feature-previous")
    assert f"<h1>Feature {visitor.shown()[1]}</h1>" in visitor.html()


def test_a_note_is_kept_found_and_seen_by_others_and_its_markup_is_text(path: Path, root: Path) -> None:
    one, two = Visitor(path, 1), Visitor(path, 1)
    feature, sae = one.shown()[0], looks(Store(root))[0].sae
    one["note-name"].value, one["note-text"].value = EVIL, "fires on <b>corners</b>"
    one.press("note-save")
    assert f"<h1>Feature {feature} · {escape(EVIL)}</h1>" in one.html() and EVIL not in one.html()
    assert notes.of(root, sae)[feature].text == "fires on <b>corners</b>"
    one["explore-search"].value_input = "CORNERS"
    assert one.shown() == [feature]
    two["note-name"].value = "another name"  # by somebody who does not know of the first
    two.press("note-save")
    assert notes.of(root, sae)[feature].name == "another name"
    assert f"{escape(EVIL)} · fires on &lt;b&gt;corners" in two.html()  # is kept, and shown below
    assert two["explore-source"].data["name"][0] == "another name"
    Visitor(path, 1)["explore-search"].value_input = "another"
    assert [note.name for note in notes.versions(root, sae, feature)] == ["another name", EVIL]
    two["note-name"].value = "x" * 81
    two.press("note-save")
    assert "name of a note: at most 80 characters (got 81)" in two.html()
    Store(root).sync()
    assert rows(root, "SELECT feature, name FROM note WHERE sae = ?", sae) == [(feature, "another name")]


def test_sessions_do_not_mix(path: Path, root: Path) -> None:
    one, two = Visitor(path, 1), Visitor(path, 1)
    before = two.shown(), two.html(), two["explore-sae"].value
    one["explore-search"].value_input = "3"
    one["explore-sae"].value = one["explore-sae"].options[1][0]
    assert (two.shown(), two.html(), two["explore-sae"].value) == before


def test_the_front_leads_to_the_features_of_its_sae(path: Path, root: Path) -> None:
    visitor = Visitor(path, 2)
    source = visitor["front-source"]
    stored = rows(
        root,
        "SELECT sae, l0, nmse FROM pareto p JOIN sae s ON s.unit = p.sae JOIN unit u ON u.unit = s.acts "
        "WHERE u.label = ? ORDER BY l0, sae",
        visitor["front-of"].value,
    )
    assert list(zip(source.data["sae"], source.data["l0"], source.data["nmse"], strict=True)) == stored
    assert len(stored) == 2
    for i, (sae, _, _) in enumerate(stored):
        visitor["tabs"].active = 2
        source.selected.indices = [i]
        assert visitor["tabs"].active == 1
        chosen = visitor["explore-sae"].value
        assert sae in [look.sae for look in looks(Store(root)) if look.unit == chosen]


def test_what_is_looked_at_is_steered_with(path: Path) -> None:
    visitor = Visitor(path, 1)
    feature = visitor.shown()[0]
    visitor.press("feature-steer")
    assert visitor["tabs"].active == 0
    assert (visitor["finder"].value, visitor["numbers"].value) == ("numbers", str(feature))
    visitor["tabs"].active = 2
    other = next((value for value, _ in visitor["steered"].options if value != visitor["steered"].value), None)
    visitor["steered"].value = other or visitor["steered"].value
    visitor.press("go-on")
    assert visitor["tabs"].active == 0 and visitor["target"].options


def test_probes_and_edits_are_those_of_the_store(path: Path, root: Path) -> None:
    visitor = Visitor(path, 2)
    cells = visitor["probe-cells"].data
    label = visitor["probes-of"].value
    stored = rows(
        root,
        "SELECT config->>'$.lr', config->>'$.weight_decay', 100 * f.value FROM probe p JOIN unit u ON u.unit = p.acts "
        "JOIN final f ON f.unit = p.unit AND f.name = 'valid_accuracy' WHERE u.label = ?",
        label,
    )
    assert len(stored) == 4
    told = {(float(x), float(y)): v for x, y, v in zip(cells["x"], cells["y"], cells["value"], strict=True)}
    assert told == {(float(x), float(y)): v for x, y, v in stored}
    for way in SAID:
        visitor["way"].value = way
        visitor["measure"].value = "probability"
        edits = rows(
            root,
            "SELECT dose, 100 * mean, 100 * low, 100 * high FROM outcome WHERE unit = ? AND way = ? AND chosen_by = ? "
            "AND role = 'other class' AND measure = 'probability' AND target IS NULL AND against IS NULL ORDER BY dose",
            visitor["steered"].value, way, way,
        )  # fmt: skip
        shown = visitor["doses-0"].data
        assert list(zip(*(shown[name] for name in ("dose", "mean", "low", "high")), strict=True)) == edits
        assert visitor["doses-1"].data["dose"] == visitor["doses-2"].data["dose"] == shown["dose"]


def test_neither_tab_loads_a_model(path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a backbone is built")

    monkeypatch.setattr(tiny.TinyVit, "build", refuse)
    assert Explore(root, lambda *_: None).panel and Compare(root, lambda _: False, lambda _: None).panel


def test_names_from_files_are_text_and_never_html(path: Path) -> None:
    for tab in (1, 2):
        shown = Visitor(path, tab).html()
        assert "<script>" not in shown and "<b>red" not in shown and "<i>tiny" not in shown
    assert escape("<i>tiny-") in Visitor(path, 1).html()


def test_what_is_gone_or_not_made_is_said_and_the_tab_stays_alive(path: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("saefw: 1\nstages: {}\n")
    visitor = Visitor(tmp_path / "registry.yaml", 1)
    assert f"{tmp_path / 'runs' / INDEX}: there is no index yet" in visitor.html()
    visitor["tabs"].active = 2
    shutil.copytree(root, tmp_path / "runs")
    for unit in (tmp_path / "runs" / "visuals").iterdir():
        (unit / "picture.parquet").unlink()
    for unit in (tmp_path / "runs" / "train").iterdir():
        (unit / "sae.safetensors").write_bytes(b"no tensors")
    visitor["tabs"].active = 1  # by now there is something
    shown = visitor.html()
    assert "picture.parquet: cannot be read; delete" in shown and "sae.safetensors: cannot be read" in shown
    assert "<dt>AP</dt>" in shown
    visitor.press("feature-next")
    assert f"<h1>Feature {visitor.shown()[1]}</h1>" in visitor.html()
    for name in ("visuals", "train", "probe", "steer"):
        shutil.rmtree(tmp_path / "runs" / name)
    Store(tmp_path / "runs").sync()
    empty = Visitor(tmp_path / "registry.yaml", 1)
    assert "No SAE was looked at yet: add a stage with <code>use: visuals</code>" in empty.html()
    empty["tabs"].active = 2
    assert "Nothing is made yet that could be compared: run <code>saefw run</code> first." in empty.html()


# In a browser


def _serve(path: Path, told: Any) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    listening = server(path, port)
    listening.start()
    told.put(port)
    listening.io_loop.start()


@pytest.fixture(scope="module")
def address(path: Path) -> Iterator[str]:
    """Where a process of its own serves the page."""
    context = get_context("spawn")
    told = context.Queue()
    process = context.Process(target=_serve, args=(path, told), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{told.get(timeout=90)}/steering"
    finally:
        process.kill()
        process.join()


@contextmanager
def looking(chromium: "Browser", address: str) -> Iterator["Page"]:
    with chromium.new_context(viewport={"width": 1280, "height": 900}) as context:
        seen = context.new_page()
        faults: list[str] = []
        seen.on("pageerror", lambda error: faults.append(str(error)))
        seen.goto(address)
        seen.get_by_text("Explore", exact=True).first.click()
        seen.locator("h1", has_text="Feature").wait_for()
        yield seen
        assert faults == []


def test_in_a_browser_a_note_is_saved_found_and_still_there_after_a_reload(
    chromium: "Browser", address: str, root: Path
) -> None:
    with looking(chromium, address) as seen:
        head = seen.locator("h1", has_text="Feature")
        feature = head.inner_text()
        seen.get_by_label("Name", exact=True).fill(EVIL)
        seen.get_by_label("Name", exact=True).press("Tab")
        seen.get_by_text("Save the note").click()
        seen.locator("h1", has_text=EVIL).wait_for()
        seen.locator(".slick-row", has_text=EVIL).wait_for()
        assert seen.title() == "saefw steering"
    with looking(chromium, address) as seen:
        seen.get_by_label("Search").fill("onerror")
        seen.locator(".count h2", has_text=re.compile("^1 of ")).wait_for()
        seen.locator(".slick-row", has_text=EVIL).first.click()
        assert seen.locator("h1", has_text="Feature").inner_text() == f"{feature} · {EVIL}"
        assert seen.get_by_label("Name", exact=True).input_value() == EVIL
        assert seen.title() == "saefw steering"
        assert seen.locator(".slick-row").count() == 1


def test_in_a_browser_no_key_is_lost_while_the_table_changes(chromium: "Browser", address: str) -> None:
    with looking(chromium, address) as seen:
        field, head = seen.get_by_label("Search"), seen.locator("h1", has_text="Feature")
        for number in ("13", "12"):
            field.click()
            for key in ("Control+a", "Delete", *number):
                seen.keyboard.press(key)
                seen.wait_for_timeout(150)  # as one types; the table has changed by then
            assert field.input_value() == number
            seen.keyboard.press("Enter")
            head.filter(has_text=re.compile(rf"^Feature {number}\b")).wait_for()


def test_in_a_browser_a_box_over_the_points_and_a_row_of_the_table_choose(chromium: "Browser", address: str) -> None:
    with looking(chromium, address) as seen:
        count = seen.locator(".count h2")
        every = count.inner_text()
        canvas = seen.locator(".bk-Figure:visible canvas").first
        canvas.hover(force=True)  # once it stays where it is
        plot = canvas.bounding_box()
        assert plot
        seen.mouse.move(plot["x"] + plot["width"] / 2, plot["y"] + 8)
        seen.mouse.down()
        seen.mouse.move(plot["x"] + plot["width"] - 8, plot["y"] + plot["height"] - 60, steps=5)
        seen.mouse.up()
        count.filter(has_not_text=every).wait_for()
        row = seen.locator(".slick-row").nth(1)
        row.wait_for()
        number = row.locator(".slick-cell").first.inner_text()
        row.click()
        seen.locator("h1", has_text=f"Feature {number}").wait_for()
        # Names of classes with markup are text in the table too.
        assert "<b>red</b>" in seen.locator(".slick-viewport").first.inner_text()
