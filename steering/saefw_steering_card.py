"""The card of a feature on the steering page: what it is, and a slider, a number and a mode to edit it by."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from bokeh.models.layouts import Row
from bokeh.models.widgets import Button, Select, Slider, Spinner

import saefw_steering_style as style
from saefw_steering_live import Live
from saefw_steering_state import Edited
from saefw_steering_views import div

MODES = {"set": "set", "add": "add", "scale": "times", "ablate": "ablate"}


class Ways(NamedTuple):
    """How the amounts of a mode are chosen."""

    start: float
    end: float
    neutral: float | None
    """The amount that changes nothing; none: only leaving the feature as observed does."""

    said: str
    """What is done to a feature, for people."""


class Facts(NamedTuple):
    """What a card tells of a feature."""

    feature: int
    about: str
    """HTML."""

    largest: float
    """Its largest value on the tokens that are edited, in units of its p99."""

    n_firing: int
    """On how many of them it fires."""

    where: str
    """Which these are, in words: `3 patches`."""


class FeatureCard:
    """A feature with its example pictures, and a slider that is at rest until somebody moves it."""

    def __init__(
        self, name: str, group: str, live: Live, ways: Callable[[str], Ways], changed: Callable[[int], None]
    ) -> None:
        """Call `changed` when somebody edits the feature; what changes with every move is said to `live`."""
        self.facts: Facts | None = None
        self.amount: float | None = None
        """What it is edited by; none: it stays as observed."""
        self.lit = False
        """Whether its patches are lit."""
        self._name, self._group, self._live = name, group, live
        self._ways, self._quiet, self._changed = ways, False, changed
        field: dict[str, Any] = {"margin": 0, "stylesheets": [style.FIELD]}
        self.about, self.state = div("", "about"), live.div(f"state-{name}")
        self.state.css_classes = ["state"]
        self.slider = Slider(
            start=0,
            end=3,
            value=0,
            step=0.05,
            title=None,
            show_value=False,
            tooltips=False,
            margin=0,
            name=f"slider-{name}",
            css_classes=["slider"],
            stylesheets=[style.SLIDER],
            sizing_mode="stretch_width",
        )
        self.number = Spinner(
            **field,
            value=None,
            step=0.05,
            format="0.00",
            placeholder="observed",
            width=74,
            name=f"number-{name}",
            css_classes=["number"],
        )
        options: list[Any] = list(MODES.items())
        self.mode = Select(**field, options=options, value="set", width=66, name=f"mode-{name}", css_classes=["mode"])
        self.reset = Button(
            label="×", width=24, margin=0, name=f"reset-{name}", css_classes=["reset"], stylesheets=[style.ROUND]
        )
        parts: list[Any] = [self.about, self.state, self.slider, self.mode, self.number, self.reset]
        self.model = Row(children=parts, name=f"card-{name}", stylesheets=[style.FEATURE], sizing_mode="stretch_width")
        self.slider.on_change("value", self._asked)
        self.number.on_change("value", lambda _attr, _old, new: None if new == self.amount else self._ask(new))
        self.mode.on_change("value", self._mode_chosen)
        self.reset.on_click(lambda: self._ask(None))
        self._look()

    @property
    def edited(self) -> Edited | None:
        """What is done to the feature, if anything is."""
        if self.facts is None or self.amount is None:
            return None
        mode: Any = self.mode.value
        return Edited(feature=self.facts.feature, mode=mode, amount=self.amount)

    def show(self, facts: Facts | None, mode: str, amount: float | None) -> None:
        """Show a feature, edited by an amount or as observed; none: hide the card."""
        self.facts = facts
        if facts is None:
            self.amount = None
            self._look()
            return
        self.about.text = facts.about  # not sent again if it is unchanged, so the pictures do not flicker
        self._quiet = True
        self.mode.value = mode
        self._quiet = False
        self.set(amount)

    def set(self, amount: float | None) -> None:
        """Edit the feature by an amount, or leave it as observed, without calling `changed`."""
        if self.facts is None:
            return
        self.amount = amount
        ways, facts = self._ways(str(self.mode.value)), self.facts
        rest = facts.largest if ways.neutral is None else ways.neutral
        if amount is not None:
            state = f'<div class="state edited">{ways.said} {amount:.2f}</div>'
        elif facts.n_firing:
            state = f'<div class="state" title="on {facts.where}">up to {facts.largest:.2f} on {facts.where}</div>'
        else:
            state = '<div class="state">silent here</div>'
        self._live.texts[str(self.state.name)] = state
        self._quiet = True
        self.slider.update(start=ways.start, end=ways.end)
        shown = min(max(rest if amount is None else amount, ways.start), ways.end)
        if abs(shown - self.slider.value) > 1e-6:  # what it says itself is not said back to it while it is dragged
            self.slider.value = shown
        self._quiet = False
        self._live.numbers[self.number] = amount
        self._look()

    def highlight(self, feature: int | None) -> None:
        """Show whether it is this feature whose patches are lit."""
        self.lit = self.facts is not None and self.facts.feature == feature
        self._look()

    def _look(self) -> None:
        if self.facts is None:
            self._live.look(self.model)
            return
        more = ["edited"] * (self.amount is not None) + ["lit"] * self.lit
        self._live.look(self.model, "feature", self._group, f"f-{self.facts.feature}", *more)

    def _mode_chosen(self, _attr: str, _old: object, _new: object) -> None:
        if not self._quiet:
            self._ask(None)

    def _asked(self, _attr: str, _old: object, new: float | None) -> None:
        if not self._quiet:
            self._ask(new)

    def _ask(self, amount: float | None) -> None:
        # A slider counts in binary: 2.5000000000000004 is nobody's wish.
        wanted = round(min(max(amount, -1000), 1000), 6) if amount is not None and math.isfinite(amount) else None
        self.set(wanted)
        if self.facts:
            self._changed(self.facts.feature)
