"""Says what differs among the members of a sweep, and how it is written for people."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from saefw.style import shown


def changing(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the settings that differ among entries, or that only some of them have."""
    texts = [{key: json.dumps(value) for key, value in config.items()} for config in configs]
    keys = dict.fromkeys(key for text in texts for key in text)
    return [key for key in keys if len({text.get(key) for text in texts}) > 1]


def ordered(values: Iterable[Any]) -> list[Any]:
    """Return the different values, numbers by size, anything else after them by name."""
    number = (int, float)
    return sorted(
        {json.dumps(value): value for value in values}.values(),
        key=lambda value: (not isinstance(value, number), value if isinstance(value, number) else str(value)),
    )


def written(value: Any) -> str:
    """Return a value as figures write it."""
    return f"{value:g}" if isinstance(value, float | int) and not isinstance(value, bool) else shown(str(value))


def words(key: str) -> str:
    """Return the name of a setting or a metric for people: `learning rate`."""
    return {"lr": "learning rate"}.get(key, key.replace("_", " "))
