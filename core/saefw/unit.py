"""The smallest thing made once and kept, and its address."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

WORD = re.compile(r"[A-Za-z0-9_-]+")
"""What a name is made of: letters, digits, - and _."""


def canonical(value: object) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, ASCII, no NaN.

    Raises:
        ValueError: a number is NaN or infinite.
        TypeError: a value is not JSON.

    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True)
class Unit:
    """One thing to make: what it is (hashed) and what people and stages call it (not hashed)."""

    stage: str
    """The `use` of the stage that makes it: `train`. Not the entry's name, which may change."""

    content: dict[str, Any]
    """Every setting that decides the result, defaults included; plain JSON."""

    needs: tuple["Unit", ...] = ()
    """The units it is made from, in an order that the stage fixes."""

    label: str = field(default="", compare=False)
    """For people: `topk k=8 on digits, layer 1`."""

    given: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The entries it was planned from, knobs included, so that `make` need not rebuild them."""

    def __post_init__(self) -> None:
        """Refuse a stage whose units would lie elsewhere than in a folder of the store that is theirs."""
        if not WORD.fullmatch(self.stage) or self.stage in ("locks", "notes"):
            raise ValueError(f"a stage is called by letters, digits, - and _, not locks or notes (got {self.stage!r})")

    @cached_property
    def text(self) -> str:
        """The canonical JSON that is hashed; also what `unit.json` holds."""
        return canonical({"stage": self.stage, "content": self.content, "needs": [need.address for need in self.needs]})

    @cached_property
    def address(self) -> str:
        """The first 12 hex digits of the SHA-256 of `text`: a Merkle node, as in git."""
        return sha256(self.text.encode()).hexdigest()[:12]

    def __hash__(self) -> int:
        """Equal units have equal addresses."""
        return hash(self.address)
