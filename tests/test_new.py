"""The examples of plugins, as `saefw new` writes them: short, sound by all tools, and at work at once."""

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from saefw import __version__
from saefw.catalog import Catalog
from saefw.cli import app
from saefw.new import EXAMPLES
from saefw.registry import read
from saefw.testing import check_imports

TOP = Path(__file__).parents[1]
PLUGINS = TOP / "examples/plugins"

MOST = {"sae": 30, "dataset": 25, "probe": 25, "backbone": 40, "metric": 10, "figure": 20, "watcher": 10}
"""Lines of code that an example may have."""


def code_lines(source: str) -> int:
    """Count lines that are neither empty nor a comment nor part of a docstring."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    lines = [line.strip() for line in source.splitlines()]
    return sum(bool(line) and not line.startswith("#") for i, line in enumerate(lines, 1) if i not in docs)


def test_lines_of_code_are_counted() -> None:
    assert (
        code_lines('"""Two\nlines."""\n\n# one\nx = 1  # here\n\n\ndef f():\n    """One."""\n    return """a\nb"""\n')
        == 4
    )


@pytest.mark.parametrize("kind", MOST)
def test_examples_are_short(kind: str) -> None:
    assert code_lines((PLUGINS / f"my_{kind}.py").read_text()) <= MOST[kind]


def test_the_docs_say_how_short() -> None:
    told = re.findall(r"my_(\w+)\.py\).*\| (\d+) \|$", (TOP / "docs/plugins.md").read_text(), re.M)
    assert {kind: int(n) for kind, n in told} == {
        kind: code_lines((PLUGINS / f"my_{kind}.py").read_text()) for kind in EXAMPLES
    }


def test_there_is_nothing_else() -> None:
    names = {name for kind in EXAMPLES for name in (f"my_{kind}.py", f"test_my_{kind}.py", f"my_{kind}.yaml")}
    assert {path.name for path in PLUGINS.iterdir() if path.name != "__pycache__"} == names


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a new plugin of every kind; the current one, and on the path."""
    folder = tmp_path_factory.mktemp("new")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        for kind in EXAMPLES:
            result = CliRunner().invoke(app, ["new", kind, f"Fresh{kind.capitalize()}-2"])
            assert result.exit_code == 0, result.output
        yield folder
        for path in folder.glob("*.py"):
            sys.modules.pop(path.stem, None)


def test_what_is_written(written: Path) -> None:
    stems = [f"fresh_{kind}_2" for kind in EXAMPLES]
    names = {name for stem in stems for name in (f"{stem}.py", f"test_{stem}.py", f"{stem}.yaml")}
    assert {path.name for path in written.iterdir()} >= {*names, "fresh_dataset_2_images"}
    assert len(list((written / "fresh_dataset_2_images").glob("?/digit-*.png"))) == 120
    for name in names:
        text = (written / name).read_text()
        assert "my_" not in text and "my-" not in text and "My" not in text, name


def test_ruff_is_content(written: Path) -> None:
    """As it is by default, and with the rules that this project keeps itself to."""
    strict = ["--line-length", "120", "--select", "B,D,E,F,I,RUF,UP", "--ignore", "D203,D213,D105,D107,D401"]
    for options in (["check"], ["check", *strict], ["format", "--check"], ["format", "--check", *strict[:2]]):
        done = subprocess.run([_tool("ruff"), *options, "--isolated", str(written)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_mypy_is_content(written: Path) -> None:
    """With this project's own settings, whose cache is there once its types were checked."""
    files = [str(path) for path in sorted(written.glob("*.py"))]
    done = subprocess.run([_tool("mypy"), "--strict", *files], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow  # it reads all of torch
def test_mypy_is_content_without_the_plugin_of_pydantic(written: Path) -> None:
    files = [str(path) for path in sorted(written.glob("*.py"))]
    bare = ["--strict", "--config-file", "", "--cache-dir", str(written / "cache")]
    done = subprocess.run([_tool("mypy"), *bare, *files], cwd=written, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_each_passes_its_own_test(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_imports(f"fresh_{kind}_2" for kind in EXAMPLES)
    for kind in EXAMPLES:
        function = getattr(importlib.import_module(f"test_fresh_{kind}_2"), f"test_fresh_{kind}_2")
        needed = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
        function(**{name: needed[name] for name in function.__annotations__ if name in needed})


def test_each_registry_runs(written: Path) -> None:
    for kind in EXAMPLES:
        result = CliRunner().invoke(app, ["run", f"fresh_{kind}_2.yaml"])
        assert result.exit_code == 0, result.output
    assert {path.name for path in (written / "runs").iterdir() if path.is_dir()} >= {
        "record", "train", "probe", "draw", "fresh-stage-2", "fresh_metric_2", "fresh_watcher_2",
    }  # fmt: skip
    measured = ["sql", "--csv", "SELECT DISTINCT name FROM metric", "--registry", "fresh_metric_2.yaml"]
    assert "fresh-metric-2" in CliRunner().invoke(app, measured).stdout.split()
    lines = (written / "fresh_watcher_2.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["unit"] == "topk, vit on digits, layer 2"


def test_a_package_is_found_once_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["new", "sae", "soft-threshold", "--package"])
    assert result.stdout.splitlines() == [
        "saefw-soft-threshold/saefw_soft_threshold.py: the plugin; change it as you like",
        "saefw-soft-threshold: the package; install it with: pip install -e saefw-soft-threshold",
        "saefw-soft-threshold/tests/test_saefw_soft_threshold.py: its test; run it with: cd saefw-soft-threshold; "
        "python -m pytest",
        "saefw-soft-threshold/registry.yaml: runs it; run it with: saefw run saefw-soft-threshold/registry.yaml",
    ]
    top, site = tmp_path / "saefw-soft-threshold", tmp_path / "site"
    assert (
        "from saefw_soft_threshold import SoftThreshold\n" in (top / "tests/test_saefw_soft_threshold.py").read_text()
    )
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", str(site), str(top)], check=True)
    monkeypatch.syspath_prepend(site)
    catalog = Catalog()
    assert catalog.origin(catalog.lookup("saes")["soft-threshold"]) == "saefw-soft-threshold 0.1.0"
    assert "sweep" in read(top / "registry.yaml", catalog).families["stages"]
    sys.modules.pop("saefw_soft_threshold")


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("saes", "x", f"no such kind of plugin: 'saes'; did you mean 'sae'? ({', '.join(EXAMPLES)})"),
        ("sae", "3x", "a name is made of words of letters and digits, as soft-threshold (got '3x')"),
        ("sae", "topk", f"saes: 'topk' is brought by saefw {__version__}; take another name"),
        ("metric", "nmse", f"metrics: 'nmse' is brought by saefw {__version__}; take another name"),
        ("probe", "json", "a module 'json' is there, Python's own; take another name, as my-json"),
        ("probe", "torch", f"a module 'torch' is there, that of {torch.__file__}; take another name, as my-torch"),
        ("stage", "lambda", "'lambda' is a word of Python; take another name, as my-lambda"),
        (
            "sae",
            "Entries",
            "the plugin that would be written uses the name 'Entries' itself; take another, as my-entries",
        ),
        ("probe", "here", "test_here.py: is there already; nothing was written"),
    ],
)
def test_what_cannot_be_written(
    kind: str, name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_here.py").write_text("# mine\n")
    result = CliRunner().invoke(app, ["new", kind, name])
    assert (result.exit_code, result.stderr) == (1, f"{said}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["test_here.py"]


def test_half_of_it_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures, last, cannot be written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("saefw.new.N_IMAGES", -1)
    result = CliRunner().invoke(app, ["new", "dataset", "pictures"])
    assert result.exit_code == 1 and not list(tmp_path.iterdir())


def _tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))
