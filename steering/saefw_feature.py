"""The page of a feature: its strongest images, its values, classes and neighbours, and the note that it has."""

from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np
from bokeh.models.annotations import Span
from bokeh.models.layouts import Column, Row
from bokeh.models.ranges import DataRange1d, Range1d
from bokeh.models.sources import ColumnDataSource
from bokeh.models.widgets import Button, TextAreaInput, TextInput
from bokeh.plotting import figure

import saefw_explore_style as own
import saefw_findings as findings
import saefw_steering_style as style
from saefw import notes
from saefw.errors import UserError, escaped
from saefw.store import Store
from saefw_findings import Features, Look, Seen
from saefw_steering_views import div

NEAR = 8
"""Features most like this one that are named."""


class FeaturePage:
    """What is known of one feature; its note can be changed."""

    def __init__(
        self,
        store: Store,
        go_to: Callable[[int], None],
        save: Callable[[int, str, str], notes.Note],
        step: Callable[[int], None],
        steer: Callable[[str, int], None],
    ) -> None:
        """Show nothing as yet.

        Args:
            store: what is read.
            go_to: called with another feature.
            save: called with a note.
            step: called with 1 or -1 for the next feature or the one before.
            steer: called with an SAE and a feature of it that somebody wants to edit.

        """
        self.store, self._save = store, save
        self.feature = -1
        self.head, self.facts, self.tiles = _text(), _text(), _text()
        self.classes, self.history = _text(), _text()
        self.moves = [
            Button(label=label, name=f"feature-{name}", stylesheets=[style.BUTTON], margin=0, width=38)
            for label, name in (("←", "previous"), ("→", "next"))
        ]
        for by, button in zip((-1, 1), self.moves, strict=True):
            button.on_click(lambda by=by: step(by))
        self.name = TextInput(name="note-name", title="Name", max_length=notes.NAME, **own.WIDE)
        self.text = TextAreaInput(
            name="note-text", title="Note", rows=2, max_length=notes.TEXT, stylesheets=[own.AREA], margin=0,
            sizing_mode="stretch_width",
        )  # fmt: skip
        self.save = Button(label="Save the note", name="note-save", stylesheets=[style.BUTTON], margin=0)
        self.save.on_click(self._saved)
        self.steer = Button(label="Steer with it", name="feature-steer", stylesheets=[style.BUTTON], margin=0)
        self.steer.on_click(lambda: steer(self.look.sae, self.feature))
        self.bins = ColumnDataSource({name: [] for name in ("left", "right", "top")})
        self.marks = [Span(dimension="height", line_color=own.CHOSEN, line_width=2, line_dash=dash)
                      for dash in ("solid", "dashed", "dotted")]  # fmt: skip
        self.histogram = self._histogram()
        self.near = [
            Button(label="", name=f"near-{i}", visible=False, stylesheets=[style.BUTTON], margin=0) for i in range(NEAR)
        ]
        self._near: list[int] = []
        for i, button in enumerate(self.near):
            button.on_click(lambda i=i: go_to(self._near[i]))
        self.about_near = _text()
        row: dict[str, Any] = {"stylesheets": [style.BUTTONS], "sizing_mode": "stretch_width"}
        self.panel = Column(
            children=[
                Row(children=[*self.moves, self.head], stylesheets=[own.HEAD], sizing_mode="stretch_width"),
                self.facts,
                self.tiles,
                self.name,
                self.text,
                Row(children=[self.save, self.steer], **row),
                self.history,
                div("<h2>Classes that it detects best</h2>"),
                self.classes,
                div("<h2>Positive values <small>lines: median, 90th and 99th percentile</small></h2>"),
                self.histogram,
                self.about_near,
                Row(children=list(self.near), **row),
            ],
            name="feature", stylesheets=[style.CARD], sizing_mode="stretch_width", spacing=12,
        )  # fmt: skip

    def show(self, look: Look, told: Features, at: int, said: dict[int, notes.Note]) -> None:
        """Show the feature that stands `at` a place of a table, and what is said of it."""
        self.look, self.feature = look, int(told.feature_f[at])
        self._told, self._at = told, at
        note = said.get(self.feature)
        self.name.value, self.text.value = (note.name, note.text) if note else ("", "")
        self._name(note)
        try:
            seen = findings.seen(self.store, look, self.feature)
        except UserError as error:
            seen = Seen([], [], [], {})
            self.tiles.text = _problem(error)
        else:
            self._show_tiles(seen)
        self._show_facts(seen)
        self._show_values(seen)
        self._show_near(said)

    def _name(self, note: notes.Note | None) -> None:
        called = f" · {escape(escaped(note.name))}" if note and note.name else ""
        self.head.text = f"<h1>Feature {self.feature}{called}</h1>"
        versions = notes.versions(self.store.root, self.look.sae, self.feature)[1:6]
        earlier = "".join(
            f"<p>{one.made_at:%Y-%m-%d %H:%M}: {escape(one.name) or 'no name'}"
            f"{' · ' if one.text else ''}{escape(one.text[:200])}</p>"
            for one in versions
        )
        self.history.text = (
            f'<div class="history"><h2><small>Before that</small></h2>{earlier}</div>' if earlier else ""
        )

    def _saved(self) -> None:
        if self.feature < 0:
            return
        try:
            note = self._save(self.feature, self.name.value, self.text.value)
        except UserError as error:
            self.history.text = _problem(error)
            return
        self.name.value, self.text.value = note.name, note.text
        self._name(note)

    def _show_tiles(self, seen: Seen) -> None:
        examples = [example for example, *_ in seen.top]
        try:
            uris = findings.tiles(self.store, self.look, self.feature, examples)
        except UserError as error:
            self.tiles.text = _problem(error)
            return
        shown = "".join(
            f'<figure title="{escape(f"{key}: {name}" if name else key)}">'
            + (f'<img src="{uri}" alt="">' if uri else '<div class="none"></div>')
            + f"<figcaption>{escape(name or key)} · {value:.2f}</figcaption></figure>"
            for (_, key, name, value), uri in zip(seen.top, uris, strict=True)
        )
        largest = self._told.max_f[self._at]
        scale = f'<div class="glow">0<i></i>{largest:.3g}, its largest value on a patch</div>'
        on_patches = self.look.grid[0] * self.look.grid[1] > 1 and examples
        none = "<p class=faint>It fires on no image of this recording.</p>"
        self.tiles.text = f'<div class="tiles">{shown}</div>{scale if on_patches else ""}' if examples else none

    def _show_facts(self, seen: Seen) -> None:
        told, at = self._told, self._at
        facts = [
            ("fires on", f"{100 * told.frequency_f[at]:.3g} %"),
            ("mean", f"{told.mean_f[at]:.3g}"),
            ("p99", f"{told.p99_f[at]:.3g}"),
            ("largest", f"{told.max_f[at]:.3g}"),
            ("AP", f"{told.ap_f[at]:.2f}"),
            ("purity", f"{told.purity_f[at]:.2f}"),
            ("monosemanticity", f"{told.monosemanticity_f[at]:.2f}"),
        ]
        cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts if value != "nan")
        self.facts.text = f"<dl>{cells}</dl>"
        rows = "".join(
            f'<tr><td title="{escape(name)}">{escape(name)}</td>'
            f'<td><span class="bar" style="width: {40 * ap:.0f}px"></span>{ap:.2f}</td>'
            f"<td>{100 * share:.1f} %</td><td>{purity:.2f}</td><td>{100 * rate:.1f} %</td></tr>"
            for name, ap, share, purity, rate in seen.classes
        )
        head = "<tr><th>class</th><th>AP</th><th>share of mass</th><th>purity</th><th>images</th></tr>"
        self.classes.text = f"<table>{head}{rows}</table>" if rows else "<p class=faint>No class is known of it.</p>"

    def _show_values(self, seen: Seen) -> None:
        low, high, n = np.array(seen.bins, dtype=np.float64).reshape(-1, 3).T
        # Of a logarithmic axis: the steps differ in width, so what is drawn is a share of all a step of the axis.
        width = np.log10(high) - np.log10(low)
        self.bins.data = {"left": low, "right": high, "top": n / max(n.sum(), 1) / np.where(width > 0, width, 1)}
        for mark, name in zip(self.marks, ("p50", "p90", "p99"), strict=True):
            mark.visible = name in seen.quantiles
            mark.location = seen.quantiles.get(name, 0)
        if len(low):
            self.histogram.x_range.update(start=low[0], end=high[-1])

    def _show_near(self, said: dict[int, notes.Note]) -> None:
        head = "<h2>Neighbours <small>by the cosine of decoder rows</small></h2>"
        try:
            found = findings.neighbours(self.store, self.look, self.feature, NEAR)
        except UserError as error:
            found, head = [], head + _problem(error)
        self.about_near.text = head
        self._near = [feature for feature, _ in found]
        for i, button in enumerate(self.near):
            button.visible = i < len(found)
            if i < len(found):
                feature, cosine = found[i]
                name = f" {escaped(said[feature].name)[:24]}" if feature in said and said[feature].name else ""
                button.label = f"{feature}{name} · {cosine:.2f}"

    def _histogram(self) -> Any:
        plot = figure(
            name="histogram",
            height=150,
            sizing_mode="stretch_width",
            tools="",
            toolbar_location=None,
            x_axis_type="log",
            x_range=Range1d(start=0.1, end=1),
            y_range=DataRange1d(start=0),
            min_border=0,
            margin=0,
            x_axis_label="value, in the units of codes",
        )
        own.plain(plot)
        plot.quad(left="left", right="right", bottom=0, top="top", color=own.POINT, alpha=0.6, line_color=None,
                  source=self.bins)  # fmt: skip
        plot.yaxis.visible = False
        for mark in self.marks:
            plot.add_layout(mark)
        return plot


def _text() -> Any:
    made = div("")
    made.stylesheets = [own.PAGE]
    return made


def _problem(error: UserError) -> str:
    return f'<p class="problem">{escape(str(error))}</p>'
