"""What a visitor of the steering page has chosen, as data: for links, for undo, for saved edits.

Whoever opens a link may have written it: everything in it is checked here, and what it names is only ever compared with
what is there.
"""

import json
import time
from typing import Annotated, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from saefw.plugin import UserError

LONGEST = 8_000
"""Characters of a link's state."""

TOGETHER = 1.0
"""Seconds within which changes of one feature are one step of undo."""

Address = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
Number = Annotated[int, Field(ge=0, lt=2**31)]
Mode = Literal["set", "add", "scale", "ablate"]
Finder = Literal["here", "controls", "numbers", "detectors", "effect"]


class Edited(BaseModel):
    """What is done to a feature."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    feature: Number
    mode: Mode
    amount: Annotated[FiniteFloat, Field(ge=-1000, le=1000)]
    """In units of its p99; a factor with mode `scale`, a share with `ablate`."""


class State(BaseModel):
    """All that decides what the page shows of an image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sae: Address
    probe: Address
    split: Literal["test", "valid", "train"] = "test"
    example: Number | None = None
    """None: an image that the visitor brought, which no link holds."""

    target: Number = 0
    """The class of the middle column."""

    place: Literal["patches", "cls"] = "patches"
    directly: bool = False
    patches: Annotated[tuple[Number, ...], Field(max_length=4096)] = ()
    """Which are edited; none: all."""

    edits: Annotated[tuple[Edited, ...], Field(max_length=64)] = ()
    finder: Finder = "here"
    """What the third column shows."""

    label: Number = 0
    """The class that its features are found by."""

    numbers: Annotated[tuple[Number, ...], Field(max_length=64)] = ()
    """The features that are found by number."""

    top: Literal[5, 10, 20, 50] = 10
    """At most so many classes are shown."""


class Past:
    """The states that a visitor went through, and where among them the page is."""

    def __init__(self) -> None:
        """Begin with none."""
        self._states: list[State] = []
        self._here, self._last, self._when = -1, "", 0.0

    def note(self, state: State, what: str) -> None:
        """Add a state behind the present one, unless it is that one; soon after a change of the same, in its place."""
        if state == self.at(0):
            return
        now = time.monotonic()
        together = bool(what) and what == self._last and now - self._when < TOGETHER
        del self._states[self._here + (0 if together else 1) :]
        self._states.append(state)
        self._here, self._last, self._when = len(self._states) - 1, what, now

    def at(self, by: int) -> State | None:
        """Return the state so many steps from here; none if there is none."""
        at = self._here + by
        return self._states[at] if 0 <= at < len(self._states) else None

    def go(self, by: int) -> None:
        """Be so many steps from here."""
        self._here, self._last = self._here + by, ""


def written(state: State) -> str:
    """Return the state as it stands in a link, without what is as usual."""
    return quote(json.dumps(state.model_dump(mode="json", exclude_defaults=True), separators=(",", ":")))


def read(text: str) -> State:
    """Return the state that a link holds.

    Raises:
        UserError: it holds something else.

    """
    if len(text) > LONGEST:
        raise UserError(f"the link is too long ({len(text)} characters; at most {LONGEST}), so the page starts anew")
    try:
        return State.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "state"
        raise UserError(f"the link cannot be read ({where}: {first['msg']}), so the page starts anew") from error
