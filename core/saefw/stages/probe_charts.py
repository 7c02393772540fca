"""Charts of what probes answer: confusion, calibration, and what is left of it when SAEs stand in.

Each is read off the index alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from saefw.plugin import FigureConfig, Pick, UserError, hookimpl
from saefw.style import FAINT, PALETTE, shown
from saefw.wording import or_listed

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Units = Mapping[str, Sequence[Path]]

ROOM = 5.0
"""Classes whose names fit beside an inch of a panel."""


class Picked(NamedTuple):
    """The probe that is shown of a recording."""

    unit: str
    acts: str
    label: str
    measured: dict[str, float]

    @property
    def n(self) -> int:
        """How many test images it was reported on."""
        return int(self.measured["n_test"])


class OfProbes(FigureConfig):
    """A chart with a panel for each recording that probes were fitted on, of the probe that is picked."""

    wants: ClassVar[tuple[str, ...]] = ("probe",)

    probe: Pick = Pick(highest="valid_accuracy")
    """Which probe is shown, of each recording: say the same as the stage that uses it."""

    def draw(self, db: "DuckDBPyConnection", units: Units) -> "Figure":
        """Draw a panel for each recording, two in a row where the figure is wide."""
        from matplotlib.figure import Figure

        picked = self._picked(db, [folder.name for folder in units["probe"]])
        columns = min(len(picked), 2 if self.width > 5 else 1)
        rows = -(-len(picked) // columns)
        # A single panel in a wide figure is no wider than it is high.
        across = self.width / columns if len(picked) > 1 or self.width <= 5 else 0.68 * self.width
        width = across * columns
        figure = Figure(figsize=(width, self.height or rows * (0.92 * across + 0.5)))
        all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in all_axes[len(picked) :]:
            axes.remove()
        for one, axes in zip(picked, all_axes, strict=False):
            title = self.fill(db, one, axes, across)
            if text := shown(title, 200) if self.title is None else self.title:
                axes.set_title(fill(text, int(10.5 * across)), fontsize=9)
        return figure

    def fill(self, db: "DuckDBPyConnection", one: Picked, axes: "Axes", inches: float) -> str:
        """Draw the panel of a probe, so many inches wide; return its title."""
        raise NotImplementedError

    def _picked(self, db: "DuckDBPyConnection", addresses: list[str]) -> list[Picked]:
        rows = db.execute(
            "SELECT p.unit, p.acts, u.label, map(list(f.name), list(f.value)) FROM probe p "
            "JOIN unit u ON u.unit = p.acts JOIN final f ON f.unit = p.unit WHERE list_contains(?, p.unit) "
            "GROUP BY p.unit, p.acts, u.label, p.config ORDER BY u.label, p.acts, p.config, p.unit",
            [addresses],
        ).fetchall()
        if not rows:
            raise UserError("no probe was measured")
        by_acts: dict[str, list[Picked]] = {}
        for row in rows:
            by_acts.setdefault(row[1], []).append(Picked(*row))
        return [
            probes[self.probe.choose(f"figure {self.content()['use']}", {i: x.measured for i, x in enumerate(probes)})]
            for probes in by_acts.values()
        ]


class Confusion(OfProbes):
    """Which classes a probe takes for which: of the test images of a class, the share that is taken for each.

    With more classes than there is room for, those that are mistaken most often and those that they are taken for.
    """

    use: Literal["confusion"] = "confusion"

    classes: list[str] = Field(default_factory=list)
    """The classes to show, by name, in this order; empty: all, or those that are mistaken most often."""

    def fill(self, db: "DuckDBPyConnection", one: Picked, axes: "Axes", inches: float) -> str:
        """Draw a cell for each pair of classes."""
        from matplotlib.colors import LinearSegmentedColormap

        names = dict(db.execute("SELECT label, name FROM class WHERE unit = ? ORDER BY label", [one.acts]).fetchall())
        counts = np.zeros((len(names), len(names)))
        for label, predicted, n in db.execute(
            "SELECT label, predicted, n FROM confusion WHERE unit = ?", [one.unit]
        ).fetchall():
            counts[label, predicted] = n
        shown_c = self._chosen(names, counts, int(ROOM * inches))
        share_cc = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        some_cc = share_cc[np.ix_(shown_c, shown_c)]
        # Light to dark, as all kinds of sight and a black-and-white print tell it.
        colours = LinearSegmentedColormap.from_list("", ["#ffffff", "#cfe3f3", PALETTE[0], "#00304d"])
        image = axes.imshow(some_cc, cmap=colours, vmin=0, vmax=100, aspect="equal")
        written = 2.6 * inches >= len(shown_c)
        for (y, x), value in np.ndenumerate(some_cc):
            if written and value >= 0.5:
                axes.text(
                    x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 55 else "black"
                )
        labels = [shown(names[c], 16) for c in shown_c]
        turned = max(map(len, labels)) > 2
        axes.set_xticks(range(len(shown_c)), labels, rotation=90 if turned else 0, fontsize=7)
        axes.set_yticks(range(len(shown_c)), labels, fontsize=7)
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="taken for", ylabel="class of the image")
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.7, fraction=0.05)
        bar.set_label("% of the test images of the class", fontsize=7.5)
        few = "" if len(shown_c) == len(names) else f"; {len(shown_c)} of {len(names)} classes"
        return f"{one.label}: {one.measured['test_accuracy']:.1%} right (N = {one.n:,}{few})"

    def _chosen(self, names: Mapping[int, str], counts: np.ndarray[Any, Any], most: int) -> list[int]:
        """Return the labels to show."""
        if self.classes:
            labels = {name: label for label, name in names.items()}
            for name in self.classes:
                if name not in labels:
                    raise UserError(f"classes: there is no class '{shown(name)}'{or_listed(name, labels)}")
            return [labels[name] for name in self.classes]
        if len(names) <= most:
            return sorted(names)
        wrong = counts * (1 - np.eye(len(counts)))
        chosen: dict[int, None] = {}
        for flat in np.argsort(-wrong, axis=None, kind="stable"):
            pair = [int(c) for c in np.unravel_index(flat, wrong.shape)]
            if len(chosen | dict.fromkeys(pair)) > most:
                break
            chosen |= dict.fromkeys(pair)
        return sorted(chosen)


class Calibration(OfProbes):
    """How far a probe's confidence is its accuracy: accuracy by confidence, on test images."""

    use: Literal["calibration"] = "calibration"

    def fill(self, db: "DuckDBPyConnection", one: Picked, axes: "Axes", inches: float) -> str:
        """Draw a bar for each bin, with how far the mean confidence lies from it, and the share of images below."""
        bins = db.execute(
            "SELECT low, high, n, confidence, accuracy FROM calibration WHERE unit = ? ORDER BY bin", [one.unit]
        ).fetchnumpy()
        if not len(bins["n"]):
            raise UserError(f"the calibration of {shown(one.label, 60)} was not measured")
        low, width, accuracy = bins["low"], bins["high"] - bins["low"], bins["accuracy"]
        axes.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1, label="confidence is accuracy", zorder=3)
        axes.bar(low, accuracy, width, align="edge", color=PALETTE[5], edgecolor="white", label="accuracy")
        axes.plot(bins["confidence"], accuracy, "o", color=PALETTE[0], markersize=4, label="mean confidence", zorder=4)
        share = bins["n"] / bins["n"].sum()
        axes.bar(low, -0.2 * share / share.max(), width, align="edge", color=PALETTE[1], label="images, relative")
        axes.axhline(0, color=FAINT, linewidth=0.8)
        axes.set(xlim=(0, 1), ylim=(-0.24, 1.02), xlabel="confidence: the largest probability", ylabel="accuracy")
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        axes.legend(loc="upper left", fontsize=7)
        return f"{one.label}: expected calibration error {one.measured['test_ece']:.3f} (N = {one.n:,})"


class Faithful(FigureConfig):
    """What probes still read when tokens are replaced by each SAE's reconstruction, against L0.

    Beside the accuracy, as it was measured, stands the share that is recovered of what ablating the tokens takes away,
    with 95 % bootstrap intervals.
    """

    use: Literal["faithfulness"] = "faithfulness"
    wants: ClassVar[tuple[str, ...]] = ("faithfulness",)

    def draw(self, db: "DuckDBPyConnection", units: Units) -> "Figure":
        """Draw two panels for each probe and layer of SAEs: the accuracy, and what is recovered."""
        from matplotlib.figure import Figure

        rows = db.execute(
            "SELECT u.label, f.probe, f.acts, f.split, f.n, f.measure, p.variant, p.l0, 100 * f.clean, "
            "100 * f.reconstructed, 100 * f.ablated, f.recovered, f.low, f.high, a.layer FROM faithfulness f "
            "JOIN pareto p ON p.sae = f.sae JOIN unit u ON u.unit = f.probe JOIN acts a ON a.unit = f.acts "
            "WHERE list_contains(?, f.unit) AND p.l0 > 0 ORDER BY u.label, a.layer, f.probe, f.acts, p.l0",
            [[folder.name for folder in units["faithfulness"]]],
        ).fetchall()
        if not rows:
            raise UserError("no SAE with an L0 above 0 was replaced")
        pairs = list(dict.fromkeys(row[1:3] for row in rows))
        figure = Figure(figsize=(self.width, self.height or 3.1 * len(pairs)))
        parts = figure.subfigures(len(pairs), squeeze=False)[:, 0]
        for pair, part in zip(pairs, parts, strict=True):
            self._part(part, [row for row in rows if row[1:3] == pair])
        return figure

    def _part(self, part: "SubFigure", rows: Sequence[tuple[Any, ...]]) -> None:
        label, _, _, split, n, *_ = rows[0]
        if self.title is None:
            text = f"SAEs of layer {rows[0][-1]}, {shown(label, 120)}"
            part.suptitle(fill(text, int(13 * self.width)), x=0.012, ha="left", fontsize=9.5)
        raw, share = part.subplots(1, 2)
        variants = sorted({row[6] for row in rows})
        for measure, axes in (("accuracy", raw), ("accuracy", share), ("cross_entropy", share)):
            for i, variant in enumerate(variants):
                ours = [row for row in rows if row[5] == measure and row[6] == variant]
                x, recovered = [row[7] for row in ours], np.array([row[11:14] for row in ours], dtype=float)
                look: dict[str, Any] = {
                    "color": PALETTE[i % len(PALETTE)],
                    "marker": "os^Dvp*"[i % 7],
                    "markerfacecolor": None if measure == "accuracy" else "white",
                    "linestyle": "-" if measure == "accuracy" else "--",
                    "label": f"{variant}: {measure.replace('_', '-')}" if axes is share else variant,
                }
                if axes is raw:
                    axes.plot(x, [row[9] for row in ours], **look)
                else:
                    bars = np.abs(recovered[:, 1:].T - recovered[:, 0])
                    axes.errorbar(x, recovered[:, 0], yerr=bars, capsize=2, elinewidth=0.9, **look)
        clean, ablated = (next(row[k] for row in rows if row[5] == "accuracy") for k in (8, 10))
        for value, line, name in ((clean, "--", "the tokens as they are"), (ablated, ":", "the tokens at their mean")):
            raw.axhline(value, color=FAINT, linestyle=line, linewidth=1.1, label=name)
        share.axhline(1, color=FAINT, linestyle="--", linewidth=1.1)
        raw.set(ylabel=f"accuracy on {split}, % (N = {n:,})")
        share.set(ylabel="recovered")
        for axes in (raw, share):
            axes.set(xlabel="L0: features that fire on a token, mean")
            axes.set_xscale("log", base=2)
            axes.margins(x=0.1, y=0.08)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
            axes.legend(fontsize=7)


@hookimpl
def saefw_figures() -> list[type[FigureConfig]]:
    """Three: confusion, calibration, faithfulness."""
    return [Confusion, Calibration, Faithful]
