"""The Compare tab: SAEs by error and sparsity, probes by their settings, and what steering did beside its controls."""

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from bokeh.models.annotations import Span
from bokeh.models.layouts import Column, Row
from bokeh.models.mappers import LinearColorMapper
from bokeh.models.ranges import FactorRange
from bokeh.models.sources import ColumnDataSource
from bokeh.models.tools import HoverTool, TapTool
from bokeh.models.widgets import Select
from bokeh.plotting import figure

import saefw_explore_style as own
import saefw_findings as findings
import saefw_steering_style as style
from saefw.errors import UserError
from saefw.outcome import KINDS, MEASURES
from saefw.stages.steer_charts import LOOK, SAID
from saefw.store import Store
from saefw.style import PALETTE
from saefw.sweep import changing, ordered, words, written
from saefw_steering_layout import button, row
from saefw_steering_views import div

MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex", "star")
"""Of the variants, beside their colours."""

SHARE = ("probability", "flip")
"""Measures that are shares."""


class Compare:
    """What the store says of all SAEs, probes and edits; it is read when the tab is first looked at."""

    def __init__(self, root: Path, look_at: Callable[[str], bool], steer: Callable[[str], None]) -> None:
        """Read the store.

        Args:
            root: its folder.
            look_at: called with the address of an SAE that is chosen; it says whether there is something to look at.
            steer: called with the address of what was steered, when somebody wants to go on with it.

        Raises:
            UserError: nothing was trained, probed or steered yet, or the index cannot be read.

        """
        self.store, self._look_at, self._steer = Store(root), look_at, steer
        self.said = div("")
        self.cards: list[Any] = [card for card in (self._saes(), self._probes(), self._steering()) if card]
        if not self.cards:
            raise UserError("Nothing is made yet that could be compared: run `saefw run` first.")
        self.panel = Row(children=self.cards, name="compare", stylesheets=[own.HALVES], sizing_mode="stretch_width")

    # SAEs

    def _saes(self) -> Column | None:
        """Return the front of each recording."""
        with self.store.db() as db:
            self.saes = findings.saes(db)
        if not self.saes:
            return None
        recordings = list(dict.fromkeys(sae.recording for sae in self.saes))
        self.front_of = _select("front-of", "Trained on", recordings, recordings)
        self.front_of.on_change("value", lambda _attr, _old, _new: self._show_front())
        self.front = Column(sizing_mode="stretch_width")
        self._show_front()
        head = div("<h2>Error and sparsity <small>tap a point to see the features of the SAE</small></h2>")
        return _card([head, self.front_of, self.front, self.said])

    def _show_front(self) -> None:
        ours = [sae for sae in self.saes if sae.recording == self.front_of.value and sae.l0 > 0 and sae.nmse > 0]
        variants = sorted({sae.variant for sae in ours})
        self._front_source = ColumnDataSource(
            {
                "l0": [sae.l0 for sae in ours],
                "nmse": [sae.nmse for sae in ours],
                "dead": [100 * sae.dead for sae in ours],
                "label": [sae.label for sae in ours],
                "colour": [PALETTE[variants.index(sae.variant) % len(PALETTE)] for sae in ours],
                "marker": [MARKERS[variants.index(sae.variant) % len(MARKERS)] for sae in ours],
                "variant": [sae.variant for sae in ours],
                "sae": [sae.unit for sae in ours],
            },
            name="front-source",
        )
        plot = _figure("front", 340, x_axis_type="log", y_axis_type="log")
        plot.xaxis.axis_label, plot.yaxis.axis_label = "L0: features that fire on a token, mean", "normalised MSE"
        for variant in variants:
            line = [(sae.l0, sae.nmse) for sae in ours if sae.variant == variant]
            x, y = zip(*sorted(line), strict=True)
            plot.line(x, y, line_color=PALETTE[variants.index(variant) % len(PALETTE)], line_alpha=0.45, line_width=1.5)
        points = plot.scatter(
            "l0", "nmse", marker="marker", color="colour", size=13, source=self._front_source, legend_group="variant",
            nonselection_alpha=1.0, name="front-points",
        )  # fmt: skip
        tips = [("SAE", "@label"), ("L0", "@l0{0.0}"), ("NMSE", "@nmse{0.0000}"), ("dead", "@dead{0.0} %")]
        plot.add_tools(TapTool(renderers=[points]), HoverTool(renderers=[points], tooltips=tips))
        own.plain_legend(plot)
        self._front_source.selected.on_change("indices", self._chosen)
        self.front.children = [plot]

    def _chosen(self, _attr: str, _old: list[int], new: list[int]) -> None:
        if not new:
            return
        sae, label = (self._front_source.data[name][new[0]] for name in ("sae", "label"))
        self._front_source.selected.indices = []
        try:
            why = "" if self._look_at(sae) else "no visuals stage looked at it."
        except UserError as error:
            why = str(error)
        self.said.text = f"<p>{escape(label)}: {escape(why)}</p>" if why else ""

    # Probes

    def _probes(self) -> Column | None:
        """Return the sweep of probes of each recording."""
        with self.store.db() as db:
            self.probes = findings.probes(db)
        if not self.probes:
            return None
        recordings = list(dict.fromkeys(probe.recording for probe in self.probes))
        self.probes_of = _select("probes-of", "Read from", recordings, recordings)
        self.probes_of.on_change("value", lambda _attr, _old, _new: self._show_probes())
        self.grid, self.best = Column(sizing_mode="stretch_width"), div("")
        self._show_probes()
        return _card([div("<h2>Probes <small>accuracy on valid, %</small></h2>"), self.probes_of, self.grid, self.best])

    def _show_probes(self) -> None:
        ours = [probe for probe in self.probes if probe.recording == self.probes_of.value]
        configs = [json.loads(probe.config) for probe in ours]
        # The two settings with most values span the grid; a cell shows the best of all others.
        differing = changing(configs)
        keys = sorted(differing, key=lambda key: -len(ordered(config.get(key) for config in configs)))[:2]
        sides: list[list[str]] = [[written(x) for x in ordered(config.get(key) for config in configs)] for key in keys]
        sides += [[""]] * (2 - len(sides))
        cells: dict[tuple[str, str], float] = {}
        for probe, config in zip(ours, configs, strict=True):
            at = [written(config.get(key)) for key in keys] + [""] * (2 - len(keys))
            cells[at[0], at[1]] = max(cells.get((at[0], at[1]), -np.inf), 100 * probe.valid_accuracy)
        values = list(cells.values())
        # A range of five points at least, so that one image more or less is no contrast.
        colours = LinearColorMapper(palette=_BLUES, low=min(min(values), max(values) - 5), high=max(values))
        plot = _figure("probes", 300, x_range=FactorRange(factors=sides[0]), y_range=FactorRange(factors=sides[1]))
        plot.xaxis.axis_label = words(keys[0]) if keys else ""
        plot.yaxis.axis_label = words(keys[1]) if len(keys) > 1 else ""
        plot.grid.grid_line_color = None
        source = ColumnDataSource(
            {
                "x": [x for x, _ in cells],
                "y": [y for _, y in cells],
                "value": values,
                "said": [f"{value:.1f}" for value in values] if len(cells) <= 80 else [""] * len(cells),
            },
            name="probe-cells",
        )
        cell = plot.rect(
            "x", "y", 0.97, 0.95, fill_color={"field": "value", "transform": colours}, line_color=None, source=source
        )
        plot.text("x", "y", "said", text_align="center", text_baseline="middle", text_font_size="11px",
                  text_color="#1d1f24", source=source)  # fmt: skip
        tips = [(words(key), f"@{axis}") for key, axis in zip(keys, "xy", strict=False)]
        plot.add_tools(HoverTool(renderers=[cell], tooltips=[*tips, ("accuracy", "@value{0.00} %")]))
        self.grid.children = [plot]
        best = max(ours, key=lambda probe: (probe.valid_accuracy, -probe.valid_loss))
        self.best.text = (
            f"<p>Best on valid: {escape(best.label)}, {100 * best.valid_accuracy:.1f} % there, "
            f"<b>{100 * best.test_accuracy:.1f} %</b> on test (N = {best.n_test:,.0f}).</p>"
        )

    # Steering

    def _steering(self) -> Column | None:
        """Return what edits did, beside their controls."""
        with self.store.db() as db:
            self.outcomes = findings.outcomes(db)
        if not self.outcomes:
            return None
        labels = {one.unit: one.label for one in self.outcomes}
        ways = [way for way in SAID if any(one.way == way for one in self.outcomes)]
        self.steered = _select("steered", "Steered", list(labels), list(labels.values()))
        self.way = _select("way", "Features", ways, [SAID[way] for way in ways])
        self.measure = _select("measure", "Measure", MEASURES, [findings.MEASURED[name] for name in MEASURES])
        for select in (self.steered, self.way, self.measure):
            select.on_change("value", lambda _attr, _old, _new: self._show_steering())
        self.doses, self.about_doses = Column(sizing_mode="stretch_width"), div("")
        self._show_steering()
        fields = Row(
            children=[self.steered, self.way, self.measure], stylesheets=[own.FIELDS], sizing_mode="stretch_width"
        )
        head = div("<h2>Steering <small>mean over the images, with 95 % bootstrap intervals</small></h2>")
        go_on = button("Steer with this SAE and probe", "go-on")
        go_on.on_click(lambda: self._steer(str(self.steered.value)))
        return _card([head, fields, self.doses, self.about_doses, row(go_on)])

    def _show_steering(self) -> None:
        asked = self.steered.value, self.way.value, self.measure.value
        ours = [one for one in self.outcomes if (one.unit, one.way, one.measure) == asked]
        plot = _figure("doses", 300)
        plot.xaxis.axis_label, plot.yaxis.axis_label = "amount", findings.MEASURED[self.measure.value]
        plot.add_layout(Span(location=0, dimension="width", line_color=own.AXES, line_width=1))
        scale = 100 if self.measure.value in SHARE else 1
        said = []
        for i, kind in enumerate(KINDS):
            of = sorted((one for one in ours if one.kind == kind), key=lambda one: one.dose)
            if not of:
                continue
            name, colour, _, dash = LOOK[kind]
            # Side by side, since the intervals of controls lie on each other.
            step = 0.01 * (max(one.dose for one in ours) - min(one.dose for one in ours) or 1)
            data: dict[str, Any] = {
                "dose": [one.dose for one in of],
                "x": [one.dose + (i - 1) * step for one in of],
                "mean": [scale * one.mean for one in of],
                "low": [scale * one.low for one in of],
                "high": [scale * one.high for one in of],
                "n": [one.n for one in of],
            }
            source = ColumnDataSource(data, name=f"doses-{i}")
            dashes = {"-": "solid", "--": "dashed", ":": "dotted"}[dash]
            colour = own.AXES if kind == KINDS[2] else colour
            plot.line("x", "mean", line_color=colour, line_width=2, line_dash=dashes, source=source, legend_label=name)
            plot.segment("x", "low", "x", "high", line_color=colour, line_width=3, source=source)
            points = plot.scatter(
                "x", "mean", marker=MARKERS[i], color=colour, size=9, source=source, legend_label=name
            )
            form = [
                ("amount", "@dose"),
                ("mean", "@mean{0.000}"),
                ("interval", "@low{0.000} to @high{0.000}"),
                ("N", "@n"),
            ]
            plot.add_tools(HoverTool(renderers=[points], tooltips=form))
            said.append(
                f"<tr><td>{escape(name)}</td><td>{data['dose'][-1]:g}</td><td>{data['mean'][-1]:.3g}</td>"
                f"<td>{data['low'][-1]:.3g} to {data['high'][-1]:.3g}</td><td>{data['n'][-1]:,}</td></tr>"
            )
        head = "<tr><th>at the largest amount</th><th>amount</th><th>mean</th><th>interval</th><th>images</th></tr>"
        self.about_doses.text = f"<table>{head}{''.join(said)}</table>" if said else "<p>Nothing of it is stored.</p>"
        self.about_doses.stylesheets = [own.PAGE]
        plot.legend.location = "top_left"
        own.plain_legend(plot)
        self.doses.children = [plot]


_BLUES = tuple(
    f"#{round(244 - 102 * t):02x}{round(246 - 52 * t):02x}{round(249 - 19 * t):02x}" for t in np.linspace(0, 1, 64)
)
"""From almost white to a light blue, on which dark figures can be read."""


def _select(name: str, title: str, values: Any, said: Any) -> Select:
    options: list[Any] = list(zip(values, said, strict=True))
    return Select(name=name, title=title, options=options, value=options[0][0], visible=len(options) > 1, **own.WIDE)


def _card(children: list[Any]) -> Column:
    return Column(children=children, stylesheets=[style.CARD], sizing_mode="stretch_width", spacing=10)


def _figure(name: str, height: int, **more: Any) -> Any:
    plot = figure(
        name=name, height=height, sizing_mode="stretch_width", tools="", toolbar_location=None, min_border=0, margin=0,
        **more,
    )  # fmt: skip
    own.plain(plot)
    return plot
