"""The Explore tab: all features of an SAE in a scatter and a table, the page of one, and what people say of it.

Shapes: f features.
"""

import threading
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from bokeh.events import SelectionGeometry
from bokeh.models.callbacks import CustomJS
from bokeh.models.filters import IndexFilter
from bokeh.models.layouts import Column, Row
from bokeh.models.sources import CDSView, ColumnDataSource
from bokeh.models.tools import BoxSelectTool, HoverTool, TapTool
from bokeh.models.widgets import Button, DataTable, NumberFormatter, RangeSlider, Select, TableColumn, TextInput
from bokeh.plotting import figure

import saefw_explore_style as own
import saefw_findings as findings
import saefw_steering_style as style
from saefw import notes
from saefw.errors import UserError, escaped
from saefw.store import Store
from saefw_feature import FeaturePage
from saefw_steering_views import div

ANY = "any"
"""In place of a class: all of them."""


STAY = """
const grid = Bokeh.index.find_one(table)?.grid
if (grid == null || grid.saefw_waits) return
grid.saefw_waits = true
const take = grid.focus.bind(grid)
grid.focus = () => {
  let field = document.activeElement
  while (field?.shadowRoot?.activeElement) field = field.shadowRoot.activeElement
  if (!["INPUT", "TEXTAREA"].includes(field?.tagName)) take()
}
"""
"""A Bokeh table takes the keyboard whenever its rows change and one is chosen: from now on not from who is typing what
they are looked for by. Given back after that, keys in between would be lost."""


class Explore:
    """What one visitor looks for among the features of an SAE, and the feature that is open."""

    def __init__(self, root: Path, steer: Callable[[str, int], None], sae: str = "") -> None:
        """Show an SAE of a store.

        Args:
            root: the store.
            steer: called with an SAE and a feature that somebody wants to edit.
            sae: the address of the one to begin with; another than was looked at: the first that was.

        Raises:
            UserError: nothing was looked at yet, or the index cannot be read.

        """
        self.store = Store(root)
        self.looks = findings.looks(self.store)
        self._quiet = False
        options: list[Any] = [(look.unit, look.label) for look in self.looks]
        self.which = Select(name="explore-sae", title="SAE", options=options, value=self.looks[0].unit, **own.WIDE)
        self.show(sae)
        self.of_class = Select(name="explore-class", title="Best detected class", options=[], value=ANY, **own.WIDE)
        self.search = TextInput(
            name="explore-search", title="Search", placeholder="number, name, note or class", **own.WIDE
        )
        bounds: dict[str, Any] = {"start": 0, "end": 1, "value": (0, 1), "step": 0.05, "show_value": False}
        self.ranges = [
            RangeSlider(name=f"explore-{name}", title=None, tooltips=False, stylesheets=[style.SLIDER], **bounds,
                        sizing_mode="stretch_width", margin=0)
            for name in ("frequency", "value")
        ]  # fmt: skip
        self.said_ranges = [div(""), div("")]
        self.all = Button(label="Show all", name="explore-all", stylesheets=[style.BUTTON], margin=0)
        self.count = div("", "count")
        self.source = ColumnDataSource({name: [] for name in COLUMNS}, name="explore-source")
        self.filter = IndexFilter(indices=[])
        self.scatter = self._scatter()
        self.table = self._table()
        self.feature = FeaturePage(self.store, self.open, self._noted, self._step, steer)
        wide: dict[str, Any] = {"sizing_mode": "stretch_width"}
        ranges = [
            Column(children=[said, slider], **wide) for said, slider in zip(self.said_ranges, self.ranges, strict=True)
        ]
        browse = [
            Row(children=[self.which, self.of_class, self.search], stylesheets=[own.FIELDS], **wide),
            self.scatter,
            Row(children=[*ranges, self.all], stylesheets=[own.RANGES], **wide),
            self.count,
            self.table,
        ]
        left = Column(children=browse, stylesheets=[style.CARD], spacing=10, **wide)
        self.panel = Row(children=[left, self.feature.panel], name="explore", stylesheets=[own.HALVES], **wide)
        self._connect()
        self._show_sae()

    # What a visitor does

    def show(self, sae: str) -> bool:
        """Go to an SAE, by its address; whether it was looked at."""
        found = next((look.unit for look in self.looks if look.sae == sae), None)
        if found and found != self.which.value:
            self.which.value = found
        return found is not None

    def open(self, feature: int) -> None:
        """Open the page of a feature."""
        for at in np.flatnonzero(self.features.feature_f == feature).tolist():
            self._quiet = True
            self.source.selected.indices = [at]
            self._quiet = False
            self._name_all()
            self.feature.show(self.look, self.features, at, self.notes)

    def _connect(self) -> None:
        def heard(do: Callable[[Any], None]) -> Any:
            return lambda _attr, _old, new: None if self._quiet else do(new)

        self.which.on_change("value", heard(lambda _: self._show_sae()))
        self.of_class.on_change("value", heard(lambda _: self._show()))
        self.search.on_change("value_input", heard(lambda _: self._show()))
        self.search.js_on_change("value_input", CustomJS(args={"table": self.table}, code=STAY))
        self.search.on_change("value", heard(self._entered))
        for slider in self.ranges:
            slider.on_change("value_throttled", heard(lambda _: self._show()))
        self.all.on_click(self._forget)
        self.source.selected.on_change("indices", heard(self._picked))
        self.scatter.on_event(SelectionGeometry, self._framed)

    def _entered(self, text: str) -> None:
        """A number that is entered is a feature to open."""
        if text.strip().isdecimal() and len(text.strip()) < 10:
            self.open(int(text))

    def _picked(self, indices: list[int]) -> None:
        if indices:
            self.open(int(self.features.feature_f[indices[0]]))

    def _framed(self, event: Any) -> None:
        g = event.geometry
        if event.final and g["type"] == "rect":
            self._quiet = True
            for slider, axis in zip(self.ranges, "xy", strict=True):
                low, high = sorted((g[f"{axis}0"], g[f"{axis}1"]))
                slider.value = max(low, slider.start), min(high, slider.end)
            self._quiet = False
            self._show()

    def _forget(self) -> None:
        """Look for nothing in particular."""
        self._quiet = True
        self.search.value = self.search.value_input = ""
        self.of_class.value = ANY
        for slider in self.ranges:
            slider.value = slider.start, slider.end
        self._quiet = False
        self._show()

    def _step(self, by: int) -> None:
        """Open the next or the previous feature of those that are shown."""
        shown = self.filter.indices
        if shown:
            here = self.source.selected.indices[:1]
            place = shown.index(here[0]) + by if here and here[0] in shown else 0
            self.open(int(self.features.feature_f[shown[place % len(shown)]]))

    def _noted(self, feature: int, name: str, text: str) -> notes.Note:
        """Write a note; the index has it soon after.

        Raises:
            UserError: it cannot be written.

        """
        try:
            note = notes.write(self.store.root, self.look.sae, feature, name, text)
        except OSError as error:
            raise UserError(f"the note cannot be written ({error.strerror})") from error
        # Of a large store that takes a second, for which nobody should wait.
        threading.Thread(target=_bring_up_to_date, args=[self.store.root]).start()
        self._name_all()
        return note

    # What is shown

    def _show_sae(self) -> None:
        """Show all features of the SAE that is chosen."""
        self.look = next(look for look in self.looks if look.unit == self.which.value)
        told = self.features = findings.features(self.store, self.look)
        with np.errstate(divide="ignore"):
            x_f, y_f = np.log10(told.frequency_f), np.log10(told.mean_f)
        self._log = np.stack([np.where(np.isfinite(z), z, np.nan) for z in (x_f, y_f)])
        self._quiet = True
        present = sorted({int(label) for label in told.label_f if label >= 0})
        classes: list[Any] = [(ANY, "any"), *((str(label), told.classes.get(label, str(label))) for label in present)]
        self.of_class.update(options=classes, value=ANY, disabled=not present)
        self.search.value = self.search.value_input = ""
        for slider, z_f in zip(self.ranges, self._log, strict=True):
            alive = z_f[np.isfinite(z_f)]
            low, high = (np.floor(10 * alive.min()) / 10, np.ceil(10 * alive.max()) / 10) if len(alive) else (0, 1)
            slider.update(start=low, end=max(high, low + 0.1), value=(low, max(high, low + 0.1)))
        self._named: list[str] = []
        self.source.selected.indices = []
        self.source.data = {
            "feature": told.feature_f,
            "name": self._names(),
            "class": [told.classes.get(int(label), "") for label in told.label_f],
            "ap": told.ap_f,
            "purity": told.purity_f,
            "percent": 100 * told.frequency_f,
            "mean": told.mean_f,
            "p99": told.p99_f,
            "max": told.max_f,
            "monosemanticity": told.monosemanticity_f,
            "x": self._log[0],
            "y": self._log[1],
        }
        self._quiet = False
        self.table.columns = [column for column in self._columns() if np.isfinite(self._of(column)).any()]
        self._show()
        if len(told.feature_f):
            first = self.filter.indices[0] if self.filter.indices else 0
            self.open(int(told.feature_f[first]))

    def _show(self) -> None:
        """Show the features that fit what is looked for."""
        self._name_all()
        told, text = self.features, self.search.value_input.strip().casefold()
        fits_f = np.ones(len(told.feature_f), dtype=bool)
        if self.of_class.value != ANY:
            fits_f &= told.label_f == int(self.of_class.value)
        for slider, z_f in zip(self.ranges, self._log, strict=True):
            low, high = slider.value
            if (low, high) != (slider.start, slider.end):  # a feature that never fires is in no range
                fits_f &= (z_f >= low) & (z_f <= high)
        if text:
            fits_f &= np.fromiter((text in said for said in self._words(text)), dtype=bool, count=len(fits_f))
        self.filter.indices = np.flatnonzero(fits_f).tolist()
        for said, slider, name in zip(self.said_ranges, self.ranges, ("Fires on", "Mean value"), strict=True):
            low, high = (10**x for x in slider.value)
            unit = "% of tokens" if name == "Fires on" else ""
            scale = 100 if unit else 1
            said.text = f"<p class=faint>{name} {scale * low:.2g} to {scale * high:.2g} {unit}</p>"
        n, of = int(fits_f.sum()), len(fits_f)
        dead = int((told.frequency_f == 0).sum())
        self.count.text = (
            f"<h2>{n:,} of {of:,} features <small>{dead:,} never fire; drag a box over the points, or tap a heading "
            "to sort</small></h2>"
        )

    def _words(self, text: str) -> list[str]:
        """Return by feature what a text is looked for in: a number is one's own, or in a note."""
        said = {feature: f"{note.name}\n{note.text}".casefold() for feature, note in self.notes.items()}
        numbers = self.features.feature_f.tolist()
        if text.isdecimal():
            return [
                f"{feature if str(feature).startswith(text) else ''}\n{said.get(feature, '')}" for feature in numbers
            ]
        return [
            f"{said.get(feature, '')}\n{name.casefold()}"
            for feature, name in zip(numbers, self.source.data["class"], strict=True)
        ]

    def _names(self) -> list[str]:
        self.notes = notes.of(self.store.root, self.look.sae)
        said = {feature: escaped(note.name) for feature, note in self.notes.items()}
        return [said.get(feature, "") for feature in self.features.feature_f.tolist()]

    def _name_all(self) -> None:
        """Show the names that features have by now; somebody else may have given some."""
        now = self._names()
        if now != self.source.data["name"]:
            self.source.data = {**self.source.data, "name": now}

    # How it is laid out

    def _scatter(self) -> Any:
        plot = figure(
            name="scatter", height=300, sizing_mode="stretch_width", tools="", toolbar_location=None,
            x_axis_label="log10 of the share of tokens on which it fires", y_axis_label="log10 of its mean value",
            min_border=0, margin=0,
        )  # fmt: skip
        own.plain(plot)
        looks: dict[str, Any] = {"x": "x", "y": "y", "source": self.source, "line_color": None, "size": 5}
        looks |= {"nonselection_fill_alpha": 0.3, "nonselection_line_color": None}
        every = plot.scatter(fill_color=own.AXES, fill_alpha=0.3, selection_fill_color=own.AXES, **looks)
        fitting = plot.scatter(
            fill_color=own.POINT, fill_alpha=0.45, view=CDSView(filter=self.filter), **looks,
            selection_fill_color=own.CHOSEN, selection_fill_alpha=1.0, selection_line_color="#ffffff",
        )  # fmt: skip
        glyph: Any = fitting.nonselection_glyph
        glyph.fill_alpha = 0.45
        chosen: Any = fitting.selection_glyph
        chosen.size = 13
        box = BoxSelectTool(renderers=[])
        tips = [("feature", "@feature"), ("name", "@name"), ("class", "@class")]
        plot.add_tools(box, TapTool(renderers=[every]), HoverTool(renderers=[fitting], tooltips=tips))
        plot.toolbar.active_drag = box
        return plot

    def _columns(self) -> list[TableColumn]:
        def number(field: str, title: str, form: str) -> TableColumn:
            formatter = NumberFormatter(format=form, nan_format="", text_align="right")
            return TableColumn(field=field, title=title, formatter=formatter, width=64, default_sort="descending")

        return [
            TableColumn(field="feature", title="feature", width=60),
            TableColumn(field="name", title="name", width=130),
            TableColumn(field="class", title="class", width=110),
            number("ap", "AP", "0.00"),
            number("purity", "purity", "0.00"),
            number("percent", "fires, %", "0.000"),
            number("mean", "mean", "0.00"),
            number("p99", "p99", "0.00"),
            number("max", "largest", "0.00"),
            number("monosemanticity", "monosem.", "0.00"),
        ]

    def _of(self, column: TableColumn) -> Any:
        """Return the numbers of a column; of one of words, whether there is one."""
        values = self.source.data[column.field]
        if column.field == "class":
            return np.where(self.features.label_f >= 0, 1.0, np.nan)
        return np.zeros(1) if column.field == "name" else values

    def _table(self) -> DataTable:
        view = CDSView(filter=self.filter)
        # A table draws its rows again only where others are shown: this tells it of new names.
        self.source.js_on_change("data", CustomJS(args={"view": view}, code="setTimeout(() => view.change.emit())"))
        return DataTable(
            source=self.source,
            view=view,
            columns=[],
            name="features",
            index_position=None,
            selectable=True,
            sortable=True,
            reorderable=False,
            height=420,
            sizing_mode="stretch_width",
            margin=0,
            autosize_mode="force_fit",
            stylesheets=[own.TABLE],
        )


COLUMNS = (
    "feature", "name", "class", "ap", "purity", "percent", "mean", "p99", "max", "monosemanticity", "x", "y"
)  # fmt: skip


def _bring_up_to_date(root: Path) -> None:
    """Put the newest notes into the index, if that can be written; the next run does it too."""
    try:
        Store(root).sync()
    except (OSError, UserError) as error:
        notes.log.warning("the index has the newest notes once it can be written: %s", escape(str(error)))
