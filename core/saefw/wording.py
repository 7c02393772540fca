"""Says in words what is wrong with a setting, and what would be right."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from saefw.errors import did_you_mean


def got(value: Any) -> str:
    """Return ` (got …)`, the value as short as it can be told."""
    if value is None:
        return " (got nothing)"
    # A long list or text is cut before it is written out: only its beginning is told.
    text = repr(value[:60] if isinstance(value, str | list) else value)
    return f" (got {text if len(text) <= 60 else text[:57] + '...'})"


def near(word: str, allowed: Iterable[str]) -> str:
    """Return the nearest allowed word; of very many none, as the search takes long."""
    words = list(allowed)
    return did_you_mean(word, words) if len(words) <= 1000 else ""


def listed(words: Iterable[str]) -> str:
    """Return ` (there are: …)`, the words in order; of very many the first."""
    ordered = sorted(words)
    more = ", ..." if len(ordered) > 20 else ""
    return f" (there are: {', '.join(ordered[:20])}{more})" if ordered else " (there are none)"


def or_listed(word: str, allowed: Iterable[str]) -> str:
    """Return the nearest allowed word, or else all of them."""
    words = list(allowed)
    return near(word, words) or listed(words)


def sentence(cls: type[BaseModel], detail: Mapping[str, Any]) -> str:
    """Say what pydantic found, in our words where they are better."""
    if detail["type"] == "missing":
        return "is required"
    if detail["type"] == "extra_forbidden":
        loc = [step for step in detail["loc"] if isinstance(step, str)]
        return f"no such setting{or_listed(loc[-1], _settings(cls, loc[:-1]))}"
    if detail["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return "must be a mapping"
    text = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    allowed = re.findall("'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))
    return text + (near(detail["input"], allowed) if isinstance(detail["input"], str) else "")


def _settings(cls: type[BaseModel], steps: list[str]) -> list[str]:
    """Return the settings of an entry, or of a model inside it."""
    if not steps:
        return [name for name in cls.model_fields if name != "use"]
    if steps[0] not in cls.model_fields:  # the name that pydantic gives to a member of a union
        return _settings(cls, steps[1:])
    inner = models(cls.model_fields[steps[0]].annotation)
    return [name for model in inner for name in _settings(model, steps[1:])]


def models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models in a type such as `list[Pick] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models(part)]
