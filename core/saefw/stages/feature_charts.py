"""Charts of features: how often, how strongly and on what they fire.

Each is read off the index alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from saefw.choice import PUREST, Choice, best_classes, picked
from saefw.plugin import FigureConfig, Pick, UserError, hookimpl
from saefw.style import FAINT, INK, PALETTE, ZERO, plain_ticks, shown, wrapped
from saefw.wording import or_listed

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]
Units = Mapping[str, Sequence[Path]]

QUANTILES: Mapping[str, tuple[str, Any]] = {"p50": (PALETTE[1], "-"), "p90": (PALETTE[2], "--"), "p99": (INK, ":")}
"""Of each quantile that the tables know: colour and line."""

BARS = 20
"""Classes that are shown one by one."""

LINES = len(PALETTE)
"""SAEs that are told apart by colour."""


class OfFeatures(FigureConfig):
    """A chart of the features of one SAE."""

    wants: ClassVar[tuple[str, ...]] = ("visuals",)

    sae: Pick = PUREST
    """Which SAE, by its own metrics (nmse, l0, dead) or those of its features (n_pure, n_live)."""

    def pick(self, db: "DuckDBPyConnection", units: Units) -> tuple[str, str]:
        """Return the address of the tables of the SAE that is picked, and its label."""
        content = self.content()
        unit, label, _ = picked(db, self.sae, f"figure {content['use']}", [path.name for path in units["visuals"]])
        return unit, shown(label, 100)


class FeatureDistributions(OfFeatures):
    """How often features fire against how strongly, with both distributions; what detects a class is coloured."""

    use: Literal["feature-distributions"] = "feature-distributions"

    def draw(self, db: "DuckDBPyConnection", units: Units) -> "Figure":
        """Draw a point for each feature, and a histogram beside each axis."""
        from matplotlib.figure import Figure

        unit, label = self.pick(db, units)
        rows = db.execute(
            "SELECT feature, frequency, mean FROM feature WHERE unit = ? ORDER BY feature", [unit]
        ).fetchall()
        firing = [row for row in rows if row[1] > 0 and row[2] > 0]
        if not firing:
            raise UserError(f"no feature of {label} fires")
        feature_n, frequency_n, value_n = (np.array(column) for column in zip(*firing, strict=True))
        best, wide = best_classes(db, unit), self.width > 5
        figure = Figure(figsize=(self.width, max(3.6, 0.6 * self.width)))
        grid = figure.add_gridspec(2, 2, width_ratios=(4, 1), height_ratios=(1, 3))
        axes = figure.add_subplot(grid[1, 0])
        above, beside = figure.add_subplot(grid[0, 0], sharex=axes), figure.add_subplot(grid[1, 1], sharey=axes)
        look: dict[str, Any] = {"color": PALETTE[0]}
        if best:
            look = {"c": [best[s].ap if s in best else 0 for s in feature_n.tolist()], "vmin": 0, "vmax": 1}
        axes.set(xscale="log", yscale="log")
        # As pixels, also in SVG and PDF: there may be tens of thousands.
        points = axes.scatter(frequency_n, value_n, s=9, linewidths=0, rasterized=True, **look)
        if best:
            corner = figure.add_subplot(grid[0, 1])
            corner.axis("off")
            where = corner.inset_axes((0, 0.3, 1, 0.14))
            bar = figure.colorbar(points, cax=where, orientation="horizontal", ticks=[0, 0.5, 1] if wide else [0, 1])
            bar.ax.xaxis.set_major_formatter("{x:g}")
            where.set_title("average precision,\nbest class" if wide else "AP, best\nclass", fontsize=7, pad=3)
            where.tick_params(labelsize=7, length=0)
        for values, side, line in ((frequency_n, above, "axvline"), (value_n, beside, "axhline")):
            bins: Any = np.geomspace(values.min() / 1.05, values.max() * 1.05, 31)
            side.hist(
                values, bins=bins, color=PALETTE[0], alpha=0.75,
                orientation="vertical" if line == "axvline" else "horizontal",
            )  # fmt: skip
            for one in (side, axes):
                getattr(one, line)(np.median(values), color=PALETTE[1], linewidth=1)
        plain_ticks(axes.xaxis, axes.yaxis, most=None if wide else 4)
        above.tick_params(labelbottom=False)
        beside.tick_params(labelleft=False)
        above.set_ylabel("features")
        beside.set_xlabel("features")
        # In a narrow figure the longer one would run into its neighbour's.
        axes.set(
            xlabel="frequency: share of tokens" if wide else "share of tokens", ylabel="mean positive value, SAE units"
        )
        figure.suptitle(
            wrapped(
                f"{label}\n{len(firing):,} of {len(rows):,} features fire; medians: frequency "
                f"{np.median(frequency_n):.2g}, value {np.median(value_n):.2g}",
                self.width,
            ),
            x=0.012, ha="left", fontsize=9,
        )  # fmt: skip
        return figure


class ActivationHistograms(OfFeatures):
    """How the positive values of some features are spread, with their quantiles."""

    use: Literal["activation-histograms"] = "activation-histograms"

    features: Choice = Choice(n=25)
    """Which features: a panel each."""

    def draw(self, db: "DuckDBPyConnection", units: Units) -> "Figure":
        """Draw a panel for each feature, all on one scale of values."""
        from matplotlib.figure import Figure

        unit, label = self.pick(db, units)
        chosen = self.features.choose(db, unit)
        if not chosen:
            raise UserError(f"no feature of {label} is chosen: none fires and passes the filters")
        rows = db.execute(
            "SELECT feature, list(low ORDER BY low), list(high ORDER BY low), list(n ORDER BY low) FROM "
            "feature_histogram SEMI JOIN (SELECT unnest(?::INTEGER[]) AS feature) USING (feature) WHERE unit = ? "
            "GROUP BY feature",
            [chosen, unit],
        ).fetchall()
        spread = {feature: tuple(map(np.array, bins)) for feature, *bins in rows}
        told = {
            feature: quantiles
            for feature, *quantiles in db.execute(
                f"SELECT feature, {', '.join(QUANTILES)} FROM feature WHERE unit = ?", [unit]
            ).fetchall()
        }
        best = best_classes(db, unit)
        columns = min(len(chosen), max(1, round(self.width / 1.44)))
        n_rows = -(-len(chosen) // columns)
        figure = Figure(figsize=(self.width, 1.15 * n_rows + 0.95))
        all_axes = figure.subplots(n_rows, columns, sharex=True, squeeze=False).ravel()
        for axes, feature in zip(all_axes, chosen, strict=False):
            name = f" · {shown(best[feature].name, 14)}" if feature in best else ""
            axes.set_title(f"{feature}{name}", fontsize=7.5, pad=11)
            self._panel(axes, spread.get(feature), told[feature])
        for axes in all_axes[len(chosen) :]:
            axes.axis("off")
        all_axes[0].set_xscale("log")
        plain_ticks(all_axes[0].xaxis, most=4)
        all_axes[0].minorticks_off()  # of all: they share it
        figure.supxlabel("positive value, SAE units", x=0.012, ha="left", fontsize=7.5)
        figure.suptitle(
            wrapped(
                f"{label}\ndensity of the positive values of {len(chosen)} features: number · class it detects best",
                self.width,
            ),
            x=0.012, ha="left", fontsize=9,
        )  # fmt: skip
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=3, fontsize=7.5)
        return figure

    def _panel(self, axes: "Axes", bins: "tuple[Array, ...] | None", quantiles: Sequence[float]) -> None:
        axes.set_yticks([])
        axes.tick_params(labelsize=6.5, length=2)
        axes.spines["left"].set_visible(False)
        for (name, (colour, line)), value in zip(QUANTILES.items(), quantiles, strict=True):
            axes.axvline(value or np.nan, color=colour, ls=line, linewidth=1.1, label=name)
        if bins is None:
            axes.text(0.5, 0.5, "never fires", transform=axes.transAxes, ha="center", fontsize=7, color=FAINT)
            return
        low, high, n = bins
        edges = np.union1d(low, high)  # bins between them may be empty
        # By octave: the steps of an octave are equal, so on this axis they are not.
        density = np.zeros(len(edges) - 1)
        density[np.searchsorted(edges, low)] = n / np.log2(high / low)
        axes.stairs(density, edges, fill=True, color=PALETTE[0], alpha=0.6)
        axes.text(0, 1.03, f"N = {n.sum():,}", transform=axes.transAxes, va="bottom", fontsize=6, color=FAINT)


class ClassCoverage(OfFeatures):
    """How many classes have a feature that detects them, for every SAE, and how well each is detected by one."""

    use: Literal["class-coverage"] = "class-coverage"

    threshold: float = Field(0.3, ge=0, lt=1)
    """A class is covered when the average precision of its best feature is above this."""

    classes: list[str] = Field(default_factory=list)
    """The classes that are counted and shown, by name; empty: all."""

    def draw(self, db: "DuckDBPyConnection", units: Units) -> "Figure":
        """Draw a line for each SAE, and a bar for each class of the one that is picked."""
        from matplotlib.figure import Figure

        unit, label = self.pick(db, units)
        found = {path.name: self._best(db, path.name) for path in units["visuals"]}
        if not found[unit]:
            raise UserError("no image has a class")
        wide = self.width > 5
        n_bars = min(BARS, len(found[unit]))
        figure = Figure(figsize=(self.width, max(3.4, 0.17 * n_bars + 1.6) if wide else 0.17 * n_bars + 4.8))
        lines, bars = figure.subplots(1, 2) if wide else figure.subplots(2, 1, height_ratios=(3.0, 0.17 * n_bars + 0.8))
        self._lines(lines, {address: of for address, of in found.items() if of}, unit, _labels(db, list(found)))
        self._bars(bars, found[unit], label)
        figure.legend(loc="outside lower left", ncols=2 if wide else 1, fontsize=7)
        return figure

    def _best(self, db: "DuckDBPyConnection", unit: str) -> dict[str, tuple[float, int]]:
        """Return by class the largest average precision of a feature and which it is, the best detected class first.

        Of a class on which nothing fires it is 0, and of feature -1.
        """
        rows = db.execute(
            "SELECT c.name, coalesce(max(p.ap), 0) AS ap, coalesce(arg_max(p.feature, (p.ap, -p.feature)), -1) "
            "FROM class c "
            "SEMI JOIN (FROM feature WHERE unit = $unit) f ON f.acts = c.unit "
            "SEMI JOIN example e ON e.unit = c.unit AND e.label = c.label "
            "LEFT JOIN class_feature p ON p.unit = $unit AND p.label = c.label GROUP BY c.label, c.name "
            "ORDER BY ap DESC, c.label",
            {"unit": unit},
        ).fetchall()
        found = {name: (ap, feature) for name, ap, feature in rows}
        for name in self.classes if found else ():
            if name not in found:
                raise UserError(f"classes: no image is of '{shown(name)}'{or_listed(name, found)}")
        return {name: told for name, told in found.items() if not self.classes or name in self.classes}

    def _lines(
        self, axes: "Axes", found: Mapping[str, Mapping[str, tuple[float, int]]], unit: str, labels: Mapping[str, str]
    ) -> None:
        covered = {address: sum(ap > self.threshold for ap, _ in of.values()) for address, of in found.items()}
        for i, address in enumerate(sorted(found, key=lambda address: (-covered[address], labels[address]))):
            ap_c = np.sort([ap for ap, _ in found[address].values()])
            n = len(ap_c)
            share = f"{covered[address]} of {n}: {shown(labels[address], 48)}"
            axes.step(
                [0, *ap_c, 1], np.array([n, *range(n - 1, -1, -1), 0]) / n, where="post",
                color=PALETTE[i] if i < LINES else ZERO, linewidth=2.4 if address == unit else 1.2,
                label=share if i < LINES else None, zorder=2 if i < LINES else 1,
            )  # fmt: skip
        axes.axvline(self.threshold, color=FAINT, linewidth=0.8, linestyle="--")
        axes.set(
            xlim=(0, 1), ylim=(0, 1.02), xlabel="average precision of the best feature",
            ylabel="share of classes above it",
            title=f"every SAE: classes whose best\nfeature is above {self.threshold:g}",
        )  # fmt: skip

    def _bars(self, axes: "Axes", best: Mapping[str, tuple[float, int]], label: str) -> None:
        names = list(best)
        title = f"{len(names)} classes and their best features"
        if len(names) > BARS:
            title = f"{BARS // 2} best and {BARS // 2} worst of {len(names):,} classes"
            names = [*names[: BARS // 2], *names[-BARS // 2 :]]
        y = np.arange(len(names))
        colours = [PALETTE[0] if best[name][0] > self.threshold else ZERO for name in names]
        axes.barh(y, [best[name][0] for name in names], color=colours, height=0.72)
        for i, name in enumerate(names):
            if best[name][1] >= 0:
                axes.text(0.01, i, f"{best[name][1]}", va="center", fontsize=6.5, color="white")
        axes.set_yticks(y, [shown(name, 18) for name in names], fontsize=7.5)
        axes.invert_yaxis()
        axes.axvline(self.threshold, color=FAINT, linewidth=0.8, linestyle="--")
        axes.grid(axis="y", visible=False)
        axes.set(xlim=(0, 1), xlabel="average precision of the best feature", title=f"{shown(label, 48)}\n{title}")


def _labels(db: "DuckDBPyConnection", units: list[str]) -> dict[str, str]:
    """Return the labels of units by address."""
    return dict(db.execute("SELECT unit, label FROM unit WHERE list_contains(?, unit)", [units]).fetchall())


@hookimpl
def saefw_figures() -> list[type[FigureConfig]]:
    """Three: feature-distributions, activation-histograms, class-coverage."""
    return [FeatureDistributions, ActivationHistograms, ClassCoverage]
