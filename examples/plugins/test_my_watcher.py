"""my_watcher writes what it hears."""

import json
from pathlib import Path

import pytest
from saefw.plugin import Unit

from my_watcher import saefw_logged


def test_my_watcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each call."""
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        saefw_logged(Unit("train", {}, label="topk"), step, {"mse": 0.5})
    lines = Path("my_watcher.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"unit": "topk", "step": 2, "mse": 0.5}
