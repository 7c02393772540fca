"""The pieces of the steering page: texts, the picture with its patches, the bars."""

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from bokeh.events import SelectionGeometry, Tap
from bokeh.models.ranges import Range1d
from bokeh.models.sources import ColumnDataSource
from bokeh.models.tools import BoxSelectTool, HoverTool
from bokeh.models.widgets import Div
from bokeh.palettes import Inferno256
from bokeh.plotting import figure
from bokeh.transform import linear_cmap
from numpy.typing import NDArray

import saefw_steering_style as style
from saefw.pictures import enlarged, lit

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = NDArray[np.float64]

SIDE = 384
"""Pixels of the picture; a screen with fewer points a pixel sees all of them."""


def div(html: str, *css_classes: str, wide: bool = True, name: str | None = None) -> Div:
    """Return text that is HTML already; nothing in it is read as mathematics."""
    return Div(
        text=html,
        name=name,
        css_classes=list(css_classes),
        disable_math=True,
        stylesheets=[style.TEXT],
        margin=0,
        sizing_mode="stretch_width" if wide else None,
    )


def percent(share: float) -> str:
    """Return a share as the page writes it, in HTML: 97.8 %, < 0.1 %."""
    return "&lt; 0.1\N{NO-BREAK SPACE}%" if 0 < share < 0.0005 else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


class Picture:
    """The image as the model sees it; patches light up where a feature fires, and can be chosen."""

    def __init__(self, grid: tuple[int, int], changed: Callable[[], None]) -> None:
        """Show patches of a grid (rows, columns); call `changed` when others are chosen, if they may be."""
        self.grid, self._changed = grid, changed
        self.choosing = True
        """Whether patches may be chosen."""
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
            background_fill_color=None,
            border_fill_color=None,
        )
        self.model.axis.visible = self.model.grid.visible = False
        self._image = ColumnDataSource({"image": []})
        self.model.image_rgba(image="image", x=0, y=0, dw=columns, dh=rows, source=self._image)
        patch = np.arange(rows * columns)
        place = {"x": patch % columns + 0.5, "y": rows - patch // columns - 0.5}
        self._patches = ColumnDataSource(
            {**place, "patch": patch, "value": [""] * len(patch), "edge": np.zeros(len(patch))}
        )
        # What a feature that is pointed at does here: drawn in the browser, from the values in `heat`.
        over = ColumnDataSource(
            {**place, "value": np.zeros(len(patch)), "alpha": np.zeros(len(patch))}, name="over", syncable=False
        )
        self.model.rect(
            x="x",
            y="y",
            width=1,
            height=1,
            fill_color=linear_cmap("value", Inferno256[60:], 0, 1),
            fill_alpha="alpha",
            line_color=None,
            source=over,
        )
        self.heat = ColumnDataSource({}, name="heat")
        """By feature, its value on each patch in units of its p99, for those that are in sight."""
        self.model.tags = [self.heat]  # nothing is drawn of it before somebody points at a feature
        rects = self.model.rect(
            x="x",
            y="y",
            width=1,
            height=1,
            fill_color="#56b4e9",
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

    def choose(self, patches: Sequence[int], quiet: bool = False) -> None:
        """Choose patches; an empty list: all."""
        self.chosen = {patch for patch in patches if 0 <= patch < self.grid[0] * self.grid[1]}
        self._patches.data = {**self._patches.data, "edge": self._edges()}
        if not quiet:
            self._changed()

    def toggle(self, patches: Sequence[int]) -> None:
        """Choose patches in addition; if all of them are chosen, let them go."""
        if not self.choosing:
            return
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
    """Probabilities before and after, a pair of bars a class, and the change."""

    def __init__(self, classes: Sequence[str]) -> None:
        """Show the most probable of these."""
        self.classes = classes
        self.before: Floats = np.zeros(len(classes))
        self.after: Floats = np.zeros(len(classes))
        """What is shown, of all classes."""

    def drawn(self, before_c: Floats, after_c: Floats, top: int) -> str:
        """Return, as HTML, the `top` most probable classes before or after, sorted by label."""
        self.before, self.after = before_c, after_c
        labels = np.sort(np.argsort(-np.maximum(before_c, after_c), kind="stable")[:top])
        first = int(after_c.argmax())
        return (
            '<div class="bars">'
            + "".join(
                _bar(self.classes[label], float(before_c[label]), float(after_c[label]), label == first)
                for label in labels
            )
            + "</div>"
        )


def _bar(name: str, before: float, after: float, most: bool) -> str:
    change = 100 * (after - before)
    way = "" if abs(change) < 0.05 else " up" if change > 0 else " down"
    said = f"{change:+.1f}".replace("-", "\N{MINUS SIGN}") if way else "±0"
    return (
        f'<span class="class{" most" if most else ""}" title="{escape(name)}">{escape(name)}</span>'
        f'<span class="track"><i class="before" style="width:{100 * before:.2f}%"></i>'
        f'<i class="after" style="width:{100 * after:.2f}%"></i></span>'
        f'<span class="share">{100 * after:.1f}</span><span class="change{way}">{said}</span>'
    )


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


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1].rstrip() + "…"
