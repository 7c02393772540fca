"""Charts of the numbers: SAEs and probes.

Each is read off the index alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from saefw.plugin import FigureConfig, Pick, UserError, hookimpl
from saefw.style import FAINT, PALETTE, panels, plain_ticks, shown
from saefw.sweep import changing, ordered, words, written

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]
Units = Mapping[str, Sequence[Path]]

MARKERS = "os^Dvp*"
"""Of lines that are more than there are colours; their number shares no factor with that of the colours."""

NAMED = 20
"""How many points of a panel can have their settings written beside them."""


class Pareto(FigureConfig):
    """Normalised MSE against L0 of every SAE: how much each keeps, and how sparse it is."""

    use: Literal["pareto"] = "pareto"
    wants: ClassVar[tuple[str, ...]] = ("train",)

    def draw(self, db: "DuckDBPyConnection", units: Units) -> "Figure":
        """Draw a panel for each recording that SAEs were trained on."""
        rows = db.execute(
            "SELECT s.acts, u.label, p.layer, p.variant, s.config, p.l0, p.nmse, p.dead, f.value FROM pareto p "
            "JOIN sae s ON s.unit = p.sae JOIN unit u ON u.unit = s.acts "
            "LEFT JOIN final f ON f.unit = p.sae AND f.name = 'n_valid_tokens' "
            "WHERE list_contains(?, p.sae) AND isfinite(p.l0) AND isfinite(p.nmse) ORDER BY p.l0, p.nmse",
            [_addresses(units["train"])],
        ).fetchall()
        if not rows:
            raise UserError("no SAE has both nmse and l0")
        recordings = list(dict.fromkeys((row[0], row[1]) for row in sorted(rows, key=lambda row: (row[2], row[1]))))
        figure, all_axes = panels(len(recordings), 3.6, self.width)
        for (acts, label), axes in zip(recordings, all_axes, strict=True):
            whole = [row for row in rows if row[0] == acts]
            # A logarithmic axis has no place for them.
            here = [row for row in whole if row[5] > 0 and row[6] > 0]
            if len(here) < len(whole):
                label = f"{label} ({len(whole) - len(here)} of {len(whole)} not shown: L0 or error is 0)"
            for i, variant in enumerate(sorted({row[3] for row in here})):
                ours = [row for row in here if row[3] == variant]
                differing = changing(json.loads(row[4]) for row in ours)
                axes.plot(
                    [row[5] for row in ours], [row[6] for row in ours], marker=MARKERS[i % len(MARKERS)], label=variant
                )
                # More would lie on each other; the table `sae` has them.
                for row in ours if len(here) <= NAMED else ():
                    config = json.loads(row[4])
                    said = ", ".join(f"{key} {written(config[key])}" for key in differing if key in config)
                    dead = f"{row[7]:.0%} dead" if row[7] is not None and row[7] >= 0.005 else ""
                    axes.annotate(
                        "\n".join(filter(None, (said, dead))), (row[5], row[6]), (6, 4), textcoords="offset points",
                        fontsize=7, color=FAINT,
                    )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.margins(x=0.12, y=0.12)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
            plain_ticks(axes.yaxis)
            n = next((f", N = {row[8]:,.0f} valid tokens" for row in here if row[8]), "")
            axes.set(
                xlabel="L0: features that fire on a token, mean", ylabel=f"normalised MSE{n}", title=shown(label, 100)
            )
            if here:
                axes.legend(loc="upper right")
        return figure


class ProbeGrid(FigureConfig):
    """Accuracy of every probe of a sweep on valid, the chosen one marked, its accuracy on test."""

    use: Literal["probe-grid"] = "probe-grid"
    wants: ClassVar[tuple[str, ...]] = ("probe",)

    probe: Pick = Pick(highest="valid_accuracy")
    """Which probe is framed, on each recording: say the same as the stage that uses it."""

    def draw(self, db: "DuckDBPyConnection", units: Units) -> "Figure":
        """Draw a panel for each recording that probes were fitted on."""
        rows = db.execute(
            "SELECT p.acts, u.label, p.config, map(list(f.name), list(f.value)) FROM probe p "
            "JOIN unit u ON u.unit = p.acts JOIN final f ON f.unit = p.unit WHERE list_contains(?, p.unit) "
            "GROUP BY p.unit, p.acts, u.label, p.config ORDER BY u.label, p.acts, p.config, p.unit",
            [_addresses(units["probe"])],
        ).fetchall()
        if not rows:
            raise UserError("no probe was measured")
        recordings = list(dict.fromkeys((row[0], row[1]) for row in rows))
        figure, all_axes = panels(len(recordings), 3.3, self.width)
        for (acts, label), axes in zip(recordings, all_axes, strict=True):
            self._panel(axes, label, [(json.loads(row[2]), row[3]) for row in rows if row[0] == acts])
        return figure

    def _panel(self, axes: "Axes", label: str, probes: list[tuple[dict[str, Any], dict[str, float]]]) -> None:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.patches import Rectangle

        chosen = self.probe.choose(f"figure {self.use}", {i: measured for i, (_, measured) in enumerate(probes)})
        differing = changing(config for config, _ in probes)
        # The two settings with most values span the grid; a cell shows the best of all others.
        keys = sorted(differing, key=lambda key: -len(ordered(config.get(key) for config, _ in probes)))[:2]
        values: list[list[Any]] = [ordered(config.get(key) for config, _ in probes) for key in keys]
        values += [[None]] * (2 - len(values))
        accuracy_yx, loss_yx = np.full((2, len(values[1]), len(values[0])), np.nan)
        places = []
        for config, measured in probes:
            x, y = (values[i].index(config.get(keys[i])) if i < len(keys) else 0 for i in range(2))
            accuracy_yx[y, x] = np.fmax(accuracy_yx[y, x], 100 * measured["valid_accuracy"])
            loss_yx[y, x] = np.fmin(loss_yx[y, x], measured.get("valid_loss", np.nan))
            places.append((x, y))
        # A range of five points at least, so that one image more or less is no contrast.
        most = np.nanmax(accuracy_yx)
        colours = LinearSegmentedColormap.from_list("", ["#f4f6f9", "#8ec2e6"])
        image = axes.imshow(
            accuracy_yx, cmap=colours, vmin=min(np.nanmin(accuracy_yx), most - 5), vmax=most, aspect="auto",
            origin="lower",
        )  # fmt: skip
        small = accuracy_yx.size <= 80
        if small:
            for (y, x), value in np.ndenumerate(accuracy_yx):
                if np.isfinite(value):
                    axes.text(x, y + 0.14, f"{value:.1f}", ha="center", va="center", fontsize=8)
                    loss = f"{loss_yx[y, x]:.3g}" if np.isfinite(loss_yx[y, x]) else ""
                    axes.text(x, y - 0.22, loss, ha="center", va="center", fontsize=6.5, color="#4b505a")
        else:
            axes.figure.colorbar(image, ax=axes, label="accuracy on valid, %")
        x, y = places[chosen]
        axes.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=PALETTE[1], lw=2.4, zorder=5, clip_on=False)
        )
        axes.grid(False)
        for edges, line in ((axes.get_xlim(), axes.axvline), (axes.get_ylim(), axes.axhline)):
            for edge in np.arange(edges[0] + 1, edges[1]):
                line(edge, color="white", linewidth=2)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks(range(len(values[0])), [written(value) for value in values[0]])
        axes.set_yticks(range(len(values[1])), [written(value) for value in values[1]] if len(keys) > 1 else [""])
        axes.set(xlabel=words(keys[0]) if keys else "", ylabel=words(keys[1]) if len(keys) > 1 else "")
        told = probes[chosen][1]
        axes.set_title(
            f"{shown(label, 100)}: {told['test_accuracy']:.1%} on test (N = {told['n_test']:,.0f})\n"
            f"cells: accuracy on valid in %{', below it the loss' if small else ''} (N = {told['n_valid']:,.0f}); "
            f"framed: {_criterion(self.probe)}"
        )


def _addresses(folders: Sequence[Path]) -> list[str]:
    return [folder.name for folder in folders]


def _criterion(pick: Pick) -> str:
    """Say what a pick goes by: `lowest valid loss`."""
    name = pick.lowest or pick.highest
    return f"{'lowest' if pick.lowest else 'highest'} {words(name)}" if name else "the first that fits"


@hookimpl
def saefw_figures() -> list[type[FigureConfig]]:
    """Two: pareto, probe-grid."""
    return [Pareto, ProbeGrid]
