"""A watcher: appends what stages measure to my_watcher.jsonl."""

import json
from collections.abc import Mapping
from pathlib import Path

from saefw.plugin import Unit, hookimpl


@hookimpl
def saefw_logged(unit: Unit, step: int, values: Mapping[str, float]) -> None:
    """Append one line."""
    line = json.dumps({"unit": unit.label, "step": step, **values})
    with Path("my_watcher.jsonl").open("a") as file:
        file.write(f"{line}\n")
