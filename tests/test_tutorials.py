"""Each tutorial of docs/plugins.md, followed line by line in an empty folder, is at work in the end."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saefw.cli import app

PAGE = (Path(__file__).parents[1] / "docs/plugins.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
BLOCK = re.compile(r"(?:`([\w./]+)`:\n\n)?^```(\w+)\n(.*?)^```", re.M | re.S)
"""A block in a fence; where the name of a file comes just before it, it is what this file holds."""

TUTORIALS = {
    "An SAE variant": ["soft-threshold,", "topk,"],
    "A dataset": ["test,0,", "train,1,", "train,-1,"],
    "A backbone": ["0,", "3,"],
    "A probe": ["lda shrink=0.01 ", "lda shrink=1 ", "linear "],
    "A metric": ["0."],
    "A figure": [],
    "A stage": ["n_train"],
    "A watcher": [],
}
"""By the title of each, what the answers to its questions hold."""


def follow(command: str) -> str:
    """Do what a line of a shell block says, in this process; return what it prints."""
    words = shlex.split(command)
    if words[0] == "saefw":
        result = CliRunner().invoke(app, [*words[1:], *(["--csv"] if words[1] == "sql" else [])])
        assert result.exit_code == 0, f"{command}: {result.output}"
        return result.stdout
    if words[:3] == ["python", "-m", "pytest"]:
        name = words[3].removesuffix(".py")
        function = runpy.run_path(words[3], run_name=name)[name]
        with pytest.MonkeyPatch.context() as patch:
            needed = {"tmp_path": Path.cwd(), "monkeypatch": patch}
            function(**{name: needed[name] for name in function.__annotations__ if name in needed})
    else:
        assert words[0] == "python", command
        runpy.run_path(words[1], run_name="__main__")
    return ""


@pytest.mark.parametrize("title", TUTORIALS)
def test_tutorial(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before, answers, commands = set(sys.modules), "", []
    for name, language, text in BLOCK.findall(SECTIONS[title]):
        if language == "sh":
            commands += text.splitlines()
            answers += "".join(map(follow, text.splitlines()))
        else:
            assert name, text
            (tmp_path / name).write_text(text)
    assert [line.split()[1] for line in commands if "saefw " in line][:2] == ["new", "run"]
    assert [part for part in TUTORIALS[title] if part not in answers] == [], answers
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_every_tutorial_is_followed() -> None:
    assert {title for title, text in SECTIONS.items() if "saefw new" in text} == {
        "Begin with one that works",
        *TUTORIALS,
        "Give it to others",
    }
