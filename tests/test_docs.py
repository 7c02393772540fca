"""The documentation is code: its YAML is loaded, its Python imported, its commands exist.

The tutorials of plugins.md are followed from the first line to the last by test_tutorials.py.
"""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from saefw.catalog import Catalog
from saefw.registry import read

TOP = Path(__file__).parents[1]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """Return (id, text) of every fenced block of a language in README.md and docs/, but for the tutorials."""
    return [
        (f"{page.name}-{i}", text)
        for page in PAGES
        if page.name != "plugins.md"
        for i, text in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S))
    ]


def cases(language: str) -> list[object]:
    return [pytest.param(text, id=name) for name, text in blocks(language)]


def loaded(text: str, name: str, folder: Path) -> ModuleType:
    """Import a block as the module that its reader would make of it."""
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("text", cases("yaml"))
def test_yaml_blocks_are_registries(text: str, tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text(text)
    assert read(path, Catalog()).families["stages"]


def test_python_blocks_are_plugins(tmp_path: Path) -> None:
    plugins = [text for _, text in blocks("python")]
    assert len(plugins) == 2
    catalog = Catalog(modules=[loaded(text, f"documented_{i}", tmp_path) for i, text in enumerate(plugins)])
    assert "class-folders" in catalog.lookup("datasets")


def test_commands_exist() -> None:
    from saefw.cli import app

    lines = {
        line.strip() for _, text in blocks("(?:sh|console)") for line in text.splitlines() if line.startswith("saefw ")
    }
    assert lines
    for line in sorted(lines):
        words = shlex.split(line, comments=True)
        result = CliRunner().invoke(app, [words[1], "--help"])
        assert result.exit_code == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in result.output, f"{line}: no {option}"


def anchors(page: Path) -> set[str]:
    """Return what a link to a heading of the page may end in, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
            if "://" not in target:
                there = page.parent / target if target else page
                assert there.exists(), f"{page.name}: {target}"
                if there.suffix == ".md" and anchor:
                    assert anchor in anchors(there), f"{page.name}: {target}#{anchor}"
