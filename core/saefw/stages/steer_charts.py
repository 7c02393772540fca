"""Charts of steering: dose and response, effects, specificity.

Each is read off the index alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from saefw.outcome import KINDS, ROLES, WAYS, bootstrap
from saefw.plugin import FigureConfig, UserError, hookimpl
from saefw.style import FAINT, PALETTE, ZERO, shown, wrapped
from saefw.wording import or_listed

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Array = np.ndarray[Any, Any]
Units = Mapping[str, Sequence[Path]]
Key = tuple[str, str, int, float]
"""Way, kind, target (-1: all), amount."""

LOOK: Mapping[str, tuple[str, str, str, str]] = {
    "features": ("features of the class", "#0072B2", "o", "-"),
    "like features": ("control: like features, same norm", "#D55E00", "^", "--"),
    "random directions": ("control: random directions, same norm", "#707580", "v", ":"),
}
"""Of each kind of edit: its name, colour, marker and line."""

SAID: Mapping[str, str] = {
    "effect": "chosen by predicted effect",
    "mass": "chosen by mass",
    "ap": "chosen by average precision",
    "single": "one feature, by predicted effect",
}
"""Of each way of choosing features."""

OF_CLASS: Sequence[tuple[str, str, Any]] = (
    (PALETTE[0], "o", "-"),
    (PALETTE[2], "s", "-."),
    (PALETTE[3], "D", (0, (1, 1))),
)
"""Colour, marker and line of each of the classes of a dose-response."""

ALL = -1
"""In place of a target: all of them."""


class Steered(NamedTuple):
    """A steer unit, as far as figures say it."""

    unit: str
    label: str
    mode: str
    raw: bool
    """Whether amounts are in the units of codes."""

    names: dict[int, str]
    """Of the classes."""

    targets: list[int]
    """The classes that edits aim at and that are shown."""

    ways: list[str]

    @property
    def amount(self) -> str:
        """What the amounts are."""
        unit = "in the units of codes" if self.raw else "× p99 of each feature"
        return {"scale": "factor", "ablate": "share taken away"}.get(self.mode, f"amount, {unit}")


class OfSteering(FigureConfig):
    """A chart with a part for each steered dataset."""

    wants: ClassVar[tuple[str, ...]] = ("steer",)

    classes: list[str] = Field(default_factory=list)
    """The target classes to show, by name; empty: as many of the first as there is room for."""

    def draw(self, db: "DuckDBPyConnection", units: Units) -> "Figure":
        """Draw a part for each steered dataset, one below the other."""
        from matplotlib.figure import Figure

        steered = [self._steered(db, folder.name) for folder in sorted(units["steer"], key=lambda path: path.name)]
        heights = [self.inches(one) for one in steered]
        figure = Figure(figsize=(self.width, self.height or sum(heights)))
        parts = figure.subfigures(len(steered), squeeze=False, height_ratios=heights)[:, 0]
        for one, part in zip(steered, parts, strict=True):
            if self.title is None:
                part.suptitle(wrapped(shown(one.label, 160), self.width), x=0.012, ha="left", fontsize=9.5)
            self.fill(db, one, part)
            handles: dict[str, Any] = {}
            for axes in part.axes:
                handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
            columns = 2 if self.width > 5 else 1
            part.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=8)
        return figure

    def inches(self, one: Steered) -> float:
        """Return how high the part of a dataset is, if nobody says it."""
        raise NotImplementedError

    def fill(self, db: "DuckDBPyConnection", one: Steered, part: "SubFigure") -> None:
        """Draw the part of a dataset."""
        raise NotImplementedError

    def columns(self, n: int) -> int:
        """Return how many of n panels stand side by side: two, if the figure is wide."""
        return min(n, 2 if self.width > 5 else 1)

    def _steered(self, db: "DuckDBPyConnection", unit: str) -> Steered:
        edits = db.execute(
            "SELECT DISTINCT way, target, mode FROM edit WHERE unit = ? AND role = ?", [unit, ROLES[1]]
        ).fetchall()
        if not edits:
            raise UserError("nothing was steered")
        names = dict(
            db.execute(
                "SELECT c.label, c.name FROM class c SEMI JOIN (FROM edit WHERE unit = ?) e ON e.acts = c.unit", [unit]
            ).fetchall()
        )
        ((label, raw),) = db.execute(
            "SELECT label, CAST(content->'$.raw' AS BOOLEAN) FROM unit WHERE unit = ?", [unit]
        ).fetchall()
        targets = {names[target]: target for target in sorted({target for _, target, _ in edits})}
        for name in self.classes:
            if name not in targets:
                raise UserError(f"classes: no edit aims at '{shown(name)}'{or_listed(name, targets)}")
        chosen = [targets[name] for name in self.classes] or list(targets.values())
        ways = {way for way, _, _ in edits}
        return Steered(unit, label, edits[0][2], bool(raw), names, chosen, [way for way in WAYS if way in ways])


class DoseResponse(OfSteering):
    """What editing one feature does to the logits of three classes, by amount, with both controls.

    A panel for each of three classes: its feature of largest predicted effect, edited alone on test images of others.
    """

    use: Literal["dose-response"] = "dose-response"
    revision: ClassVar[int] = 3

    def inches(self, one: Steered) -> float:
        """Return how high the panels and their legend are."""
        return 3.3 if self.width > 5 else 6.6

    def fill(self, db: "DuckDBPyConnection", one: Steered, part: "SubFigure") -> None:
        """Draw a panel for each of the first three classes."""
        if "single" not in one.ways:
            raise UserError("no feature was edited alone; add `single` to the ways of the steer stage")
        classes = one.targets[: len(OF_CLASS)]
        rows = db.execute(
            "SELECT e.target, e.chosen_by, l.label, e.dose, list(l.after - l.before ORDER BY e.example) FROM edit e "
            "JOIN edit_logit l ON l.unit = e.unit AND l.edit = e.edit WHERE e.unit = ? AND e.way = 'single' "
            "AND e.role = ? AND list_contains(?, e.target) AND list_contains(?, l.label) GROUP BY ALL",
            [one.unit, ROLES[1], classes, classes],
        ).fetchall()
        changes: dict[tuple[int, str, int], dict[float, Array]] = {}
        for target, kind, label, dose, values in rows:
            changes.setdefault((target, kind, label), {})[dose] = np.array(values)
        features = dict(
            db.execute(
                "SELECT label, feature FROM choice WHERE unit = ? AND way = 'single' AND rank = 0", [one.unit]
            ).fetchall()
        )
        grid = (1, len(classes)) if self.width > 5 else (len(classes), 1)
        all_axes = part.subplots(*grid, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, target in zip(all_axes, classes, strict=True):
            axes.axhline(0, color=ZERO, linewidth=0.8)
            for kind in KINDS[1:]:
                name, colour, marker, line = LOOK[kind]
                of = _means(changes.get((target, kind, target), {}))
                _line(axes, of, colour, marker, line, name, 0.25)
            n = max(map(len, changes[target, "single", target].values()))
            for label, (colour, marker, line) in zip(classes, OF_CLASS, strict=False):
                of = changes.get((target, "single", label), {})
                # With many classes only the telling logits are stored: a mean over some images would be another.
                if of and min(map(len, of.values())) == n:
                    _line(axes, _means(of), colour, marker, line, f"logit of {shown(one.names[label])}", 0.2)
            axes.set_title(f"feature {features[target]}, of {shown(one.names[target], 18)}\nN = {n:,} images")
            axes.set_xlabel(one.amount)
        all_axes[0].set_ylabel("change of logit, mean and\n95 % bootstrap interval")


class OfOutcome(OfSteering):
    """A chart of the table `outcome`, of some of it at one amount."""

    amount: float | None = None
    """The amount at which classes are shown one by one; null: the largest."""

    def rows(self, db: "DuckDBPyConnection", one: Steered, measure: str) -> dict[Key, Array]:
        """Return n, mean, low and high of edits towards another class."""
        rows = db.execute(
            "SELECT way, CASE WHEN chosen_by = way THEN ? ELSE chosen_by END, coalesce(target, ?), dose, n, mean, low, "
            "high FROM outcome WHERE unit = ? AND role = ? AND measure = ? AND against IS NULL AND n > 0 ORDER BY ALL",
            [KINDS[0], ALL, one.unit, ROLES[1], measure],
        ).fetchall()
        # Of one image there is no interval.
        return {row[:4]: np.where(np.isfinite(row[4:]), row[4:], row[5]) for row in rows}

    def dose(self, found: Mapping[Key, Array]) -> float:
        """Return the amount at which classes are shown.

        Raises:
            UserError: nothing was edited by it.

        """
        doses: list[float] = sorted({dose for *_, dose in found})
        if self.amount is None:
            return doses[-1]
        near = [dose for dose in doses if np.isclose(dose, self.amount)]
        if not near:
            there = ", ".join(f"{dose:g}" for dose in doses)
            raise UserError(f"amount: no edit is by {self.amount:g} (there are: {there})")
        return near[0]


class Effects(OfOutcome):
    """What edits do to the logit of their target, beside both controls, by amount, and class by class."""

    use: Literal["effects"] = "effects"

    def inches(self, one: Steered) -> float:
        """Return how high the panels are: of the ways, and of the classes."""
        return 2.3 * -(-len(one.ways) // self.columns(len(one.ways))) + 2.9

    def fill(self, db: "DuckDBPyConnection", one: Steered, part: "SubFigure") -> None:
        """Draw a panel for each way by amount, and one of the first way class by class."""
        found = self.rows(db, one, "logit")
        columns = self.columns(len(one.ways))
        grid = part.add_gridspec(-(-len(one.ways) // columns) + 1, columns)
        for i, way in enumerate(one.ways):
            axes = part.add_subplot(grid[divmod(i, columns)])
            axes.axhline(0, color=ZERO, linewidth=0.8)
            for kind in KINDS:
                name, colour, marker, line = LOOK[kind]
                of = {key[3]: told for key, told in found.items() if key[:3] == (way, kind, ALL)}
                _line(axes, of, colour, marker, line, name, 0.2)
            n = max(int(told[0]) for key, told in found.items() if key[:3] == (way, KINDS[0], ALL))
            axes.set_title(f"{SAID[way]}\nN = {n:,} images")
            axes.set_xlabel(one.amount)
            if i % columns == 0:
                axes.set_ylabel("change of the\ntarget’s logit")
        self._by_class(part.add_subplot(grid[-1, :]), one, found)

    def _by_class(self, axes: "Axes", one: Steered, found: Mapping[Key, Array]) -> None:
        way, targets, dose = one.ways[0], one.targets[:20], self.dose(found)
        axes.axhline(0, color=ZERO, linewidth=0.8)
        for i, kind in enumerate(KINDS):
            _, colour, marker, _ = LOOK[kind]
            for x, target in enumerate(targets):
                if (told := found.get((way, kind, target, dose))) is not None:
                    place = x + (i - 1) * 0.18
                    axes.plot([place, place], told[2:], color=colour, linewidth=2)
                    axes.plot(place, told[1], color=colour, marker=marker, markersize=4.5)
        names = [shown(one.names[target], 14) for target in targets]
        axes.set_xticks(range(len(targets)), names, rotation=30 if sum(map(len, names)) > 60 else 0)
        axes.grid(axis="x", visible=False)
        n = _counts([found[way, KINDS[0], target, dose] for target in targets])
        axes.set_title(f"{SAID[way]}, amount {dose:g}, N = {n} images a class")
        axes.set(xlabel="target", ylabel="change of its logit")


class Specificity(OfOutcome):
    """How much edits change the logit that they aim at, against how much they change all others."""

    use: Literal["specificity"] = "specificity"

    def inches(self, one: Steered) -> float:
        """Return how high the panels are."""
        return 2.9 * -(-len(one.ways) // self.columns(len(one.ways))) + 0.6

    def fill(self, db: "DuckDBPyConnection", one: Steered, part: "SubFigure") -> None:
        """Draw a panel for each way, a point for each class."""
        intended, unintended = self.rows(db, one, "logit"), self.rows(db, one, "spread")
        dose, columns = self.dose(intended), self.columns(len(one.ways))
        grid = part.add_gridspec(-(-len(one.ways) // columns), columns)
        for i, way in enumerate(one.ways):
            axes = part.add_subplot(grid[divmod(i, columns)])
            for kind in KINDS:
                name, colour, marker, _ = LOOK[kind]
                keys = [(way, kind, target, dose) for target in one.targets if (way, kind, target, dose) in intended]
                if not keys:
                    continue
                x, y = (np.array([of[key] for key in keys]).T for of in (unintended, intended))
                bars = [np.abs(told[2:] - told[1]) for told in (x, y)]
                axes.errorbar(
                    x[1], y[1], xerr=bars[0], yerr=bars[1], color=colour, marker=marker, ls="", lw=0.8, ms=4, label=name
                )
                if kind == KINDS[0] and len(keys) <= 20:
                    for key, *place in zip(keys, x[1], y[1], strict=True):
                        said = shown(one.names[key[2]], 12)
                        axes.annotate(said, tuple(place), (4, 3), textcoords="offset points", fontsize=7, color=FAINT)
            axes.axline((0, 0), slope=1, color=ZERO, linewidth=0.8)
            axes.axhline(0, color=ZERO, linewidth=0.8)
            n = _counts([intended[way, KINDS[0], target, dose] for target in one.targets])
            axes.set_title(f"{SAID[way]}, amount {dose:g}\nN = {n} images a class")
            axes.set_xlabel("all other logits: mean size of change")
            if i % columns == 0:
                axes.set_ylabel("the target’s logit: change")


def _counts(told: Sequence[Array]) -> str:
    """Say how many images there are of each class: `40`, `39 to 40`."""
    least, most = (int(some([row[0] for row in told])) for some in (min, max))
    return f"{least}" if least == most else f"{least} to {most}"


def _means(values: Mapping[float, Array]) -> dict[float, Array]:
    """Return n, mean, low and high by amount."""
    found = {}
    for dose, values_n in values.items():
        low, high = bootstrap(values_n[:, None], 0)
        told = np.array([len(values_n), values_n.mean(), low[0], high[0]])
        found[dose] = np.where(np.isfinite(told), told, told[1])
    return found


def _line(
    axes: "Axes", of: Mapping[float, Array], colour: str, marker: str, line: Any, name: str, alpha: float
) -> None:
    """Draw n, mean, low and high by amount: a line with a band, or a point with a bar where there is one amount."""
    if not of:
        return
    doses = sorted(of)
    _, mean, low, high = np.array([of[dose] for dose in doses]).T
    axes.plot(doses, mean, color=colour, marker=marker, ls=line, label=name)
    if len(doses) > 1:
        axes.fill_between(doses, low, high, color=colour, alpha=alpha, linewidth=0)
    else:
        axes.vlines(doses, low, high, color=colour)


@hookimpl
def saefw_figures() -> list[type[FigureConfig]]:
    """Three: dose-response, effects, specificity."""
    return [DoseResponse, Effects, Specificity]
