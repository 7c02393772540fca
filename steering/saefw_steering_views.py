"""The pieces of the steering page: a feature's row, the picture with its patches, the bars."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from bokeh.core.properties import value
from bokeh.events import SelectionGeometry, Tap
from bokeh.models.layouts import Row
from bokeh.models.ranges import Range1d
from bokeh.models.sources import ColumnDataSource
from bokeh.models.text import PlainText
from bokeh.models.tickers import FixedTicker
from bokeh.models.tools import BoxSelectTool, HoverTool
from bokeh.models.widgets import Button, Div, Slider, Spinner
from bokeh.plotting import figure
from numpy.typing import NDArray

import saefw_steering_style as style
from saefw.pictures import enlarged, lit

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = NDArray[np.float64]

LABELS = 14
"""The bars show so many classes at most: the most probable before or after."""

SIDE = 384
"""Pixels of the picture; a screen with fewer points a pixel sees all of them."""


def div(html: str, *css_classes: str, wide: bool = True) -> Div:
    """Return text that is HTML already; nothing in it is read as mathematics."""
    return Div(
        text=html,
        css_classes=list(css_classes),
        disable_math=True,
        stylesheets=[style.TEXT],
        margin=0,
        sizing_mode="stretch_width" if wide else None,
    )


def percent(share: float) -> str:
    """Return a share as the page writes it, in HTML: 97.8 %, < 0.1 %."""
    return "&lt; 0.1\N{NO-BREAK SPACE}%" if 0 < share < 0.0005 else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


class Ways(NamedTuple):
    """How the amounts of a mode are chosen."""

    start: float
    end: float
    neutral: float | None
    """The amount that changes nothing; none: only leaving the feature as observed does."""

    said: str
    """What is done to a feature, for people."""


class Facts(NamedTuple):
    """What a row tells of a feature."""

    feature: int
    caption: str
    """HTML."""

    thumbnails: str
    """HTML."""

    largest: float
    """Its largest value on the tokens that are edited, in units of its p99."""

    n_firing: int
    """On how many of them it fires."""

    where: str
    """Which these are, in words: `3 patches`."""


class FeatureRow:
    """A feature with its example pictures, and a slider that is at rest until somebody moves it."""

    def __init__(self, name: str, changed: Callable[[], None], lighten: Callable[[int], None]) -> None:
        """Call `changed` when somebody edits the feature, `lighten` with it when its patches are to be lit."""
        self.facts: Facts | None = None
        self.amount: float | None = None
        """What it is edited by; none: it stays as observed."""
        self._ways, self._quiet, self._changed = Ways(0, 3, None, "set to"), False, changed
        self.pick = Button(
            label="", name=f"pick-{name}", css_classes=["pick"], stylesheets=[style.PICK], width=50, margin=0
        )
        self.caption, self.thumbnails, self.state = div("", "caption"), div("", "thumbnails"), div("", "state")
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
            value=None,
            step=0.05,
            format="0.00",
            placeholder="observed",
            width=78,
            margin=0,
            name=f"number-{name}",
            css_classes=["number"],
            stylesheets=[style.FIELD],
        )
        self.reset = Button(
            label="×",
            width=28,
            margin=0,
            disabled=True,
            name=f"reset-{name}",
            css_classes=["reset"],
            stylesheets=[style.ROUND],
        )
        self.model = Row(
            children=[self.pick, self.caption, self.thumbnails, self.state, self.slider, self.number, self.reset],
            stylesheets=[style.ROW],
            sizing_mode="stretch_width",
        )
        self.pick.on_click(lambda: lighten(self.facts.feature) if self.facts else None)
        self.slider.on_change("value", self._asked)
        self.number.on_change("value", self._asked)
        self.reset.on_click(lambda: self._ask(None))

    def show(self, facts: Facts | None, ways: Ways, amount: float | None) -> None:
        """Show a feature, edited by an amount or as observed; none: hide the row."""
        self.facts, self._ways = facts, ways
        self.model.visible = facts is not None
        if facts is None:
            self.amount = None
            return
        self.pick.label = str(facts.feature)
        # Unchanged texts are not sent again, so the pictures do not flicker.
        self.caption.text, self.thumbnails.text = facts.caption, facts.thumbnails
        self._quiet = True
        self.slider.update(start=ways.start, end=ways.end)
        self._quiet = False
        self.set(amount)

    def set(self, amount: float | None) -> None:
        """Edit the feature by an amount, or leave it as observed, without calling `changed`."""
        if self.facts is None:
            return
        self.amount = amount
        ways, facts = self._ways, self.facts
        rest = facts.largest if ways.neutral is None else ways.neutral
        shown = min(max(rest if amount is None else amount, ways.start), ways.end)
        if amount is not None:
            state = f'<div class="state edited">{ways.said} {amount:.2f}</div>'
        elif facts.n_firing:
            state = f'<div class="state">up to {facts.largest:.2f} on {facts.where}</div>'
        else:
            state = '<div class="state">silent here</div>'
        self.state.text = state
        self._quiet = True
        self.slider.update(value=shown, css_classes=["slider", "rest" if amount is None else "edited"])
        self.slider.bar_color = style.BEFORE if amount is None else style.AFTER
        self.number.value = amount
        self.reset.disabled = amount is None
        self._quiet = False

    def highlight(self, feature: int | None) -> None:
        """Show whether it is this feature whose patches are lit."""
        here = self.facts is not None and self.facts.feature == feature
        self.pick.css_classes = ["pick", "lit"] if here else ["pick"]

    def _asked(self, _attr: str, _old: object, new: float | None) -> None:
        if not self._quiet:
            self._ask(new)

    def _ask(self, amount: float | None) -> None:
        # A slider counts in binary: 2.5000000000000004 is nobody's wish.
        self.set(round(amount, 6) if amount is not None and math.isfinite(amount) else None)
        self._changed()


class Picture:
    """The image as the model sees it; patches light up where a feature fires, and can be chosen."""

    def __init__(self, grid: tuple[int, int], choose: bool, changed: Callable[[], None]) -> None:
        """Show patches of a grid (rows, columns); call `changed` when others are chosen, if they may be."""
        self.grid, self._changed = grid, changed
        self.chosen: set[int] = set()
        """Patches, row by row; none: all."""
        rows, columns = grid
        self.model = figure(
            name="picture",
            x_range=Range1d(start=0, end=columns),
            y_range=Range1d(start=0, end=rows),
            aspect_ratio=columns / rows,
            sizing_mode="scale_width",
            toolbar_location=None,
            tools="",
            min_border=0,
            margin=0,
            width=SIDE,
            height=round(SIDE * rows / columns),
            outline_line_color=None,
        )
        self.model.axis.visible = self.model.grid.visible = False
        self._image = ColumnDataSource({"image": []})
        self.model.image_rgba(image="image", x=0, y=0, dw=columns, dh=rows, source=self._image)
        patch = np.arange(rows * columns)
        self._patches = ColumnDataSource(
            {
                "x": patch % columns + 0.5,
                "y": rows - patch // columns - 0.5,
                "patch": patch,
                "value": [""] * len(patch),
                "edge": np.zeros(len(patch)),
            }
        )
        rects = self.model.rect(
            x="x",
            y="y",
            width=1,
            height=1,
            fill_color=style.AFTER,
            fill_alpha=0.0,
            line_color="#56b4e9",
            line_width=2.5,
            line_alpha="edge",
            hover_fill_alpha=0.25,
            hover_fill_color="#56b4e9",
            hover_line_alpha=0.9,
            hover_line_color="#56b4e9",
            source=self._patches,
        )
        self.model.add_tools(HoverTool(renderers=[rects], tooltips="patch @patch@value", point_policy="follow_mouse"))
        if choose:
            # Its frame alone is wanted: which patches lie in it is decided here.
            box = BoxSelectTool(renderers=[])
            self.model.add_tools(box)
            self.model.toolbar.active_drag = box
            self.model.on_event(Tap, lambda event: self.toggle([self._at(event.x, event.y)]))
            self.model.on_event(SelectionGeometry, self._framed)

    def show(self, view: "Image", values_p: Floats | None, told: str) -> None:
        """Show an image, lit where `values_p` (0 to 1) is above zero, or as it is."""
        if values_p is None:
            shown = enlarged(view, SIDE)
        else:
            shown = lit(view, (255 * values_p.clip(0, 1)).round().astype(np.uint8).reshape(self.grid), SIDE)
        rgba = np.asarray(shown.convert("RGBA"))[::-1]
        self._image.data = {"image": [np.ascontiguousarray(rgba).view(np.uint32)[..., 0]]}
        n = self.grid[0] * self.grid[1]
        texts = [""] * n if values_p is None else [f": {told} {x:.2f}" for x in values_p]
        self._patches.data = {**self._patches.data, "value": texts, "edge": self._edges()}

    def choose(self, patches: Sequence[int]) -> None:
        """Choose patches; an empty list: all."""
        self.chosen = set(patches)
        self._patches.data = {**self._patches.data, "edge": self._edges()}
        self._changed()

    def toggle(self, patches: Sequence[int]) -> None:
        """Choose patches in addition; if all of them are chosen, let them go."""
        asked = set(patches)
        self.choose(sorted(self.chosen - asked if asked <= self.chosen else self.chosen | asked))

    def _edges(self) -> Floats:
        return np.array([float(patch in self.chosen) for patch in range(self.grid[0] * self.grid[1])])

    def _at(self, x: float, y: float) -> int:
        rows, columns = self.grid
        row = min(max(int(rows - y), 0), rows - 1)
        return row * columns + min(max(int(x), 0), columns - 1)

    def _framed(self, event: Any) -> None:
        g = event.geometry
        if event.final and g["type"] == "rect":
            first, last = self._at(g["x0"], g["y1"]), self._at(g["x1"], g["y0"])
            rows, columns = (range(a, b + 1) for a, b in zip(self._place(first), self._place(last), strict=True))
            self.toggle([row * self.grid[1] + column for row in rows for column in columns])

    def _place(self, patch: int) -> tuple[int, int]:
        return divmod(patch, self.grid[1])


class Bars:
    """Probabilities before and after, a pair of bars a class."""

    def __init__(self, classes: Sequence[str]) -> None:
        """Show all classes, or of many the most probable ones."""
        self.classes = classes
        self._shown: list[int] = []
        n = self.n = min(LABELS, len(classes))
        self.source = ColumnDataSource(
            {name: [] for name in ("label", "y_before", "y_after", "before", "after", "said_before", "said_after")}
        )
        self.model = figure(
            name="bars",
            # Longer names leave less room for the bars, and the numbers beside them need as much as ever.
            x_range=Range1d(start=0, end=1.2 + 0.02 * min(18, max(map(len, classes)))),
            y_range=Range1d(start=n - 0.4, end=-0.6),
            height=34 * n + 30,
            sizing_mode="stretch_width",
            toolbar_location=None,
            tools="",
            min_border=0,
            margin=0,
            outline_line_color=None,
            min_border_bottom=24,
        )
        for when, colour in (("before", style.BEFORE), ("after", style.AFTER)):
            self.model.hbar(
                y=f"y_{when}", right=when, left=0, height=0.34, color=colour, line_color=None, source=self.source
            )
            self.model.text(
                x=when,
                y=f"y_{when}",
                text=f"said_{when}",
                x_offset=4,
                text_baseline="middle",
                text_font_size="10px",
                text_font=value(style.FONT),
                text_color=style.FAINT if when == "before" else style.AFTER,
                source=self.source,
            )
        self.model.xgrid.grid_line_color, self.model.ygrid.grid_line_color = style.LINE, None
        x, y = self.model.xaxis[0], self.model.yaxis[0]
        x.ticker = self.model.xgrid[0].ticker = FixedTicker(ticks=[0, 0.5, 1])
        x.major_label_overrides = {0: "0", 0.5: "50", 1: "100 %"}
        y.ticker = FixedTicker(ticks=list(range(n)))
        for axis, size in ((x, "10px"), (y, "13px")):
            axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = None
            axis.major_label_text_font, axis.major_label_text_font_size = style.FONT, size
            axis.major_label_text_color = style.FAINT if axis is x else style.INK
        self._axis: Any = y

    def show(self, before_c: Floats, after_c: Floats) -> None:
        """Show the probabilities of all classes before and after, sorted by label."""
        strongest = np.argsort(-np.maximum(before_c, after_c), kind="stable")[: self.n]
        labels = np.sort(strongest)
        place = np.arange(len(labels))
        if labels.tolist() != self._shown:
            # A text that is a model makes Bokeh walk the whole document: only when it must.
            self._shown = labels.tolist()
            names = [PlainText(text=_short(self.classes[label], 18)) for label in self._shown]
            self._axis.major_label_overrides = dict(enumerate(names))
        self.source.data = {
            "label": labels,
            "y_before": place - 0.18,
            "y_after": place + 0.18,
            "before": before_c[labels],
            "after": after_c[labels],
            "said_before": [_told(share) for share in before_c[labels]],
            "said_after": [_told(share) for share in after_c[labels]],
        }


def verdict(classes: Sequence[str], before_c: Floats, after_c: Floats, done: str) -> str:
    """Return, as HTML, the class that is read before and the one after, and what was done between; escaped."""
    first, then = int(before_c.argmax()), int(after_c.argmax())
    words = [f'<span class="word">{escape(_short(classes[first], 24))}</span>']
    if done:
        changed = "word changed" if first != then else "word"
        words += ['<span class="arrow">→</span>', f'<span class="{changed}">{escape(_short(classes[then], 24))}</span>']
    size = len(classes[first]) + len(classes[then]) * bool(done)
    said = f"The probe reads <b>{escape(classes[first])}</b> ({percent(before_c[first])})"
    if done:
        again = "still " if first == then else ""
        said += f" and, with {escape(done)}, {again}<b>{escape(classes[then])}</b> ({percent(after_c[then])})"
    large = "large" if size <= 6 else "medium" if size <= 16 else "small"
    return f'<div class="verdict {large}">{"".join(words)}</div><p class="said">{said}.</p>'


def _told(share: float) -> str:
    return f"{100 * share:.1f}" if share >= 0.005 else ""


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1].rstrip() + "…"
