"""Class names and image keys that a page, a terminal, a font or a parser would obey, from recording to figures."""

import csv
import io
import json
import xml.etree.ElementTree
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import duckdb
import pytest
import tiny
from bokeh.core.json_encoder import serialize_json
from bokeh.document import Document
from bokeh.models.widgets import Div
from rich.console import Console
from typer.testing import CliRunner

from saefw import pipeline, registry, tables
from saefw.catalog import Catalog
from saefw.cli import app
from saefw.errors import UNPRINTED, UserError, escaped
from saefw.experiment.choices import choices
from saefw.experiment.opened import opened
from saefw_steering import page

CLASSES = (
    "$x_{\x1b[2J<script>alert(1)</script>\"'&[red] @y{z} $$\\frac\x1b]0;owned\x07\x9b31m",
    "a\nb\r\tc\x00d \u202eevil\u2066 \u2028\ufeff ' \" ; DROP TABLE unit; -- \\ %s {} {{x}}",
    "\u7279\u5fb4 \U0001f600\U0001f468\u200d\U0001f469 \u05e9\u05dc\u05d5\u05dd e\u0301 " + "x" * 300,
)
"""Markup, mathtext, escapes and control characters, quotes, another direction, other scripts, emoji; and long."""

HOSTILE = f'''
"""The tiny images under names that mean harm."""

from typing import Literal

from saefw.plugin import DatasetConfig, hookimpl
from tiny import TinyImages, TinySet


class HostileSet(TinySet):
    """The tiny images."""

    use: Literal["hostile-set"] = "hostile-set"

    note: str = ""
    """Anything."""

    def build(self, base):
        return HostileImages(self.n, self.seed, frozenset(self.broken))


class HostileImages(TinyImages):
    """With names that mean harm."""

    classes = {CLASSES!r}

    def __getitem__(self, index):
        example = super().__getitem__(index)
        return example._replace(key=f"{{self.classes[index % 3]}}/../../{{index}}")


@hookimpl
def saefw_datasets():
    """One: hostile-set."""
    return [HostileSet]
'''

REGISTRY = f"""
saefw: 1
plugins: [{Path(tiny.__file__)}, hostile_names.py]
device: cpu
backbones: {{tiny: {{use: tiny-vit}}}}
datasets: {{hostile: {{use: hostile-set, vary: {{note: ["[red]<b>$x_{{\\n\\t&\\"'"]}}}}}}
saes: {{topk: {{use: topk, expansion: 2, lr: 0.003, vary: {{k: [2, 4]}}}}}}
probes: {{linear: {{use: linear, vary: {{lr: [0.01, 0.1]}}}}}}
figures:
  front: {{use: pareto}}
  grids: {{use: feature-grid}}
  probing: {{use: probe-grid}}
  doses: {{use: dose-response}}
  case: {{use: before-after}}
stages:
  acts: {{use: record, backbone: tiny, datasets: [hostile], layers: [0, -1]}}
  sweep: {{use: train, acts: acts, saes: [topk], layers: [0], n_tokens: 4096, batch_size: 256}}
  looks: {{use: visuals, saes: sweep, acts: acts, top: 6}}
  sheets: {{use: sheets, visuals: looks}}
  probes: {{use: probe, acts: acts, probes: [linear]}}
  steer: {{use: steer, saes: sweep, probes: probes, visuals: looks, amounts: [1, 8], max_frequency: 2}}
  figures: {{use: draw, figures: [front, grids, probing, doses, case], of: [sweep, looks, probes, steer]}}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry on images with such names, everything made."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "hostile_names.py").write_text(HOSTILE, encoding="utf-8")
    (folder / "registry.yaml").write_text(REGISTRY)
    catalog = Catalog()
    pipeline.run(registry.read(folder / "registry.yaml", catalog), catalog)
    return folder / "registry.yaml"


@pytest.fixture
def db(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(str(path.parent / "runs" / "saefw.duckdb"), read_only=True) as db:
        yield db


def test_the_tables_hold_names_as_they_are(db: duckdb.DuckDBPyConnection) -> None:
    assert [name for (name,) in db.execute("SELECT DISTINCT name FROM class ORDER BY label").fetchall()] == list(
        CLASSES
    )
    keys = db.execute("SELECT DISTINCT key FROM example WHERE example = 1").fetchall()
    assert keys == [(f"{CLASSES[1]}/../../1",)]


def test_csv_and_json_give_names_as_they_are(db: duckdb.DuckDBPyConnection) -> None:
    query = 'SELECT DISTINCT label, name, name AS "[red]\x1b<b>" FROM class ORDER BY label'
    file = io.StringIO(newline="")
    tables.write_csv(db.execute(query), file)
    rows = list(csv.reader(io.StringIO(file.getvalue(), newline="")))
    assert [row[1] for row in rows[1:]] == list(CLASSES)
    file = io.StringIO()
    tables.write_json(db.execute(query), file)
    assert [row["name"] for row in json.loads(file.getvalue())] == list(CLASSES)
    assert not UNPRINTED.search(file.getvalue().replace("\n", ""))


def test_csv_on_a_terminal_is_not_obeyed(db: duckdb.DuckDBPyConnection) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    tables.write_csv(db.execute('SELECT name, 1 AS "\x1b[2J" FROM class'), file)
    assert not UNPRINTED.search(file.getvalue().replace("\n", ""))


@pytest.mark.parametrize("width", [200, 20])
def test_a_terminal_shows_names_and_obeys_none(db: duckdb.DuckDBPyConnection, width: int) -> None:
    """Wide rows as a table, narrow ones as records."""
    console = Console(markup=False, highlight=False, emoji=False, file=io.StringIO(), width=width)
    db.execute('SELECT DISTINCT label, name, [name] AS "names\x1b" FROM class ORDER BY label')
    for part in tables.found(db, width):
        console.print(part)
    text: Any = console.file
    assert not UNPRINTED.search(text.getvalue().replace("\n", ""))
    assert ("[red]" in text.getvalue()) == (width == 200)


def test_what_the_command_line_prints(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)

    def printed(*args: str, code: int = 0) -> str:
        result = CliRunner(env={"COLUMNS": "300"}).invoke(app, args)
        assert result.exit_code == code, result.output
        assert not UNPRINTED.search(result.output.replace("\n", ""))
        return result.output

    assert "note=[red]<b>$x_{\\n\\t&\"'" in printed("run", "--dry")
    assert "[red]" in printed("sql", "SELECT label FROM unit ORDER BY label")
    assert "alert(1)" in printed("sql", "FROM class")
    assert printed("sql", "SELECT \x1b[31m", code=1).count("\\x1b[31m")
    assert "no plugin brings '\\x1b[2Jx'" in printed("plugins", "\x1b[2Jx", code=1)
    assert "there is no stage '\\x1b'" in printed("run", "--stage", "\x1b", code=1)


def test_figures_draw_names_as_they_are(path: Path) -> None:
    """What a reader of SVG would not take is written out, and nothing is set as mathematics."""
    drawn = sorted((path.parent / "runs" / "draw").glob("*/*.svg"))
    assert len(drawn) == 5
    whole = ""
    for file in drawn:
        text = file.read_text()
        xml.etree.ElementTree.fromstring(text)
        assert not UNPRINTED.search(text.replace("\n", ""))
        whole += text
    assert "$x_{\\x1b[2J&lt;script&gt;" in whole
    assert "\u7279\u5fb4" in whole
    assert "<script>" not in whole


def test_nothing_was_written_elsewhere(path: Path) -> None:
    """Keys with ../ are names, never paths."""
    assert sorted(child.name for child in path.parent.iterdir()) == sorted(
        {"hostile_names.py", "registry.yaml", "runs"}
        | ({"__pycache__"} if (path.parent / "__pycache__").exists() else set())
    )
    for made in path.parent.rglob("*"):
        assert not UNPRINTED.search(str(made))


def test_the_page_shows_names_as_text(path: Path) -> None:
    doc = Document()
    page(doc, path)
    divs: Any = doc.select({"type": Div})
    html = "".join(div.text for div in divs)
    assert "<script>" not in html and "\u202e" not in html and "\x1b" not in html and "\x00" not in html
    assert any(escape(escaped(name)) in html for name in CLASSES)
    experiment = opened(choices(path)[0])
    assert list(experiment.classes) == [escaped(name) for name in CLASSES]
    assert experiment.first is None or {experiment.first.own, experiment.first.target} <= {0, 1, 2}
    # All that goes to the browser, with the axes and the lists of choices.
    sent = list(texts(json.loads(serialize_json(doc.to_json()))))
    assert not any(UNPRINTED.search(text.replace("\n", "")) for text in sent)
    assert {escaped(CLASSES[0]), escaped(experiment.acts.keys[0])} & set(sent)


def texts(value: Any) -> Iterator[str]:
    """Yield every text in what JSON holds."""
    if isinstance(value, str):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(child)


def test_a_key_that_is_not_unicode_is_refused_before_any_work(tmp_path: Path) -> None:
    """Linux allows any bytes in the name of a file; Python hands them on as halves of characters."""
    (tmp_path / "half_names.py").write_text(
        HOSTILE.replace("hostile-set", "half-set").replace('/../../{index}"', '\\udce9"'), encoding="utf-8"
    )
    text = REGISTRY.replace("hostile_names.py", "half_names.py").replace("hostile-set", "half-set")
    (tmp_path / "registry.yaml").write_text(text)
    catalog = Catalog()
    with pytest.raises(UserError) as caught:
        pipeline.run(registry.read(tmp_path / "registry.yaml", catalog), catalog)
    label = "hostile note=[red]<b>$x_{\\n\\t&\"'"
    key = CLASSES[0] + "\udce9"
    assert str(caught.value) == (
        f"{tmp_path / 'registry.yaml'}:16:3: stages.acts: {label}: image {key!r} is not called in Unicode; "
        "rename its file"
    )


def test_a_broken_image_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken_names.py").write_text(HOSTILE.replace("hostile-set", "broken-set"), encoding="utf-8")
    text = REGISTRY.replace("hostile_names.py", "broken_names.py").replace("hostile-set", "broken-set, broken: [1]")
    (tmp_path / "registry.yaml").write_text(text)
    catalog = Catalog()
    with pytest.raises(UserError) as caught:
        pipeline.run(registry.read(tmp_path / "registry.yaml", catalog), catalog)
    key = f"{CLASSES[1]}/../../1"
    assert str(caught.value) == (
        f"{tmp_path / 'registry.yaml'}:16:3: stages.acts: image {key!r} cannot be read (the file is cut short); "
        "mend it, or leave out what cannot be read with broken: skip in the stage that records"
    )
