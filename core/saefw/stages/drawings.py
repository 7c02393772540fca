"""Pictures of the findings: what features stand for, and what editing them does to one image.

Each is read off the index and the unit folders.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from saefw import pictures
from saefw.choice import PUREST, Choice, best_classes, picked
from saefw.errors import did_you_mean
from saefw.facts import commonest
from saefw.plugin import FigureConfig, Pick, UserError, hookimpl
from saefw.store import SAVED
from saefw.style import FAINT, WIDTH, shown
from saefw.tensors import number, parsed
from saefw.wording import or_listed

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

Array = np.ndarray[Any, Any]
Units = Mapping[str, Sequence[Path]]

BEFORE, AFTER = "#b4b8c1", "#0072B2"


class FeatureGrid(FigureConfig):
    """Features with their strongest images, the patches lit on which they fire."""

    use: Literal["feature-grid"] = "feature-grid"
    names_features: ClassVar[bool] = True
    wants: ClassVar[tuple[str, ...]] = ("visuals",)

    sae: Pick = PUREST
    """Which SAE, by its own metrics (nmse, l0, dead) or those of its features (n_pure, n_live)."""

    rows: int = Field(10, gt=0)
    """How many features: the best detector of each class, or the strongest features where there are no classes."""

    classes: list[str] = Field(default_factory=list)
    """The classes whose best detectors are shown, by name; empty: as many of the best detected as there are rows."""

    features: Choice | None = None
    """Which features are shown instead, `n` of them."""

    images: int = Field(8, gt=0)
    """How many images of each."""

    def draw(self, db: "DuckDBPyConnection", units: Units) -> "Figure":
        """Draw the SAE that is picked."""
        from matplotlib.figure import Figure

        unit, label, measured = picked(db, self.sae, f"figure {self.use}", [path.name for path in units["visuals"]])
        folder, label = next(path for path in units["visuals"] if path.name == unit), shown(label, 100)
        chosen = self._chosen(db, unit)
        if not chosen:
            raise UserError(f"no feature of {label} fires")
        called = _called(db, unit)
        side, gap, left = 88, 6, 168
        strips = [_strip(db, folder, feature, self.images, side, gap) for feature, _ in chosen]
        height, width = len(chosen) * (side + gap), left + max(strip.image.shape[1] for strip in strips)
        lit = any(strip.largest is not None for strip in strips)
        size, bottom = self.width / WIDTH, height + 30 * lit
        figure = Figure(figsize=(self.width, bottom * self.width / width + 0.58))
        axes = figure.add_subplot()
        axes.set(xlim=(0, width), ylim=(bottom, 0), aspect="equal")
        axes.axis("off")
        if lit:
            axes.imshow(pictures.bar()[None], extent=(left, left + 180, height + 22, height + 8), aspect="equal")
            meant = "from 0 to the feature’s largest value, in SAE units"
            axes.text(left + 188, height + 15, meant, fontsize=7 * size, va="center", color=FAINT)
        for i, ((feature, name), strip) in enumerate(zip(chosen, strips, strict=True)):
            top = i * (side + gap)
            axes.imshow(strip.image, extent=(left, left + strip.image.shape[1], top + side, top))
            axes.text(0, top + 0.27 * side, name or f"feature {feature}", fontsize=9.5 * size, va="center")
            said = [f"feature {feature}"] if name else []
            said += [called[feature]] if feature in called else []
            said += [strip.purity] if strip.purity else []
            said += [f"up to {strip.largest:.3g}"] if strip.largest is not None else []
            axes.text(
                0, top + 0.67 * side, "\n".join(said), fontsize=7 * size, va="center", color=FAINT, linespacing=1.35
            )
        told = f"{measured['n_live']:.0f} features that fire here"
        if "n_pure" in measured:
            told = f"{measured['n_pure']:.0f} of {told} are pure (at least 80 % of their top images of one class)"
        figure.suptitle(f"{label}\n{told}", x=0.006, ha="left", fontsize=9)
        return figure

    def _chosen(self, db: "DuckDBPyConnection", unit: str) -> list[tuple[int, str]]:
        """Return features, each with the class it detects best of all features, in the order of the classes."""
        if self.features is not None:
            best = best_classes(db, unit)
            return [(s, shown(best[s].name) if s in best else "") for s in self.features.choose(db, unit)]
        pairs = db.execute(
            "SELECT t.label, c.name, t.feature FROM class_feature t JOIN class c ON c.unit = t.acts AND "
            "c.label = t.label WHERE t.unit = ? ORDER BY t.ap DESC, t.label, t.feature",
            [unit],
        ).fetchall()
        known = dict.fromkeys(name for _, name, _ in pairs)
        for name in self.classes:
            if name not in known:
                raise UserError(f"classes: no feature fires on '{shown(name)}'{or_listed(name, known)}")
        taken: dict[int, tuple[str, int]] = {}
        for label, name, feature in pairs:
            wanted = name in self.classes if self.classes else len(taken) < self.rows
            if wanted and label not in taken and feature not in (f for _, f in taken.values()):
                taken[label] = name, feature
        if taken:
            return [(feature, shown(name)) for _, (name, feature) in sorted(taken.items())]
        strongest = db.execute(
            "SELECT feature FROM feature WHERE unit = ? AND frequency > 0 ORDER BY max DESC, feature LIMIT ?",
            [unit, self.rows],
        ).fetchall()
        return [(feature, "") for (feature,) in strongest]


class BeforeAfter(FigureConfig):
    """One steered image: the features that were edited, and what the probe said before and after."""

    use: Literal["before-after"] = "before-after"
    revision: ClassVar[int] = 4
    names_features: ClassVar[bool] = True
    wants: ClassVar[tuple[str, ...]] = ("steer", "visuals")

    edit: int | None = Field(None, ge=0)
    """Which stored edit, by its number in the table `edit`; null: the first example."""

    saved: str | None = None
    """Which edit that was saved on the page, by its name; null: one of the steer stage."""

    images: int = Field(5, gt=0)
    """How many of its strongest images show what a feature stands for."""

    classes: int = Field(10, gt=0)
    """At most so many classes are shown, the likeliest before or after."""

    def draw(self, db: "DuckDBPyConnection", units: Units) -> "Figure":
        """Draw the edit, or the first example, of the first steered dataset that has one.

        Raises:
            UserError: there is no edit of this number or name, or it is a random direction.

        """
        if self.saved is not None:
            return self.drawn(db, units.get("visuals", ()), _saved(db, units["steer"][0].parents[1], self.saved))
        for folder in units.get("steer", ()):
            case = _case(db, folder, self.edit)
            if case is not None:
                return self.drawn(db, units.get("visuals", ()), case)
        if self.edit is not None:
            raise UserError(f"edit: there is no edit {self.edit} of features")
        return self._nothing()

    def _nothing(self) -> "Figure":
        """Say that there is no such example: a result too, and nobody's to mend."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(self.width, 1.0))
        figure.text(0.5, 0.5, "No edit turned an image into another class.", ha="center", va="center", color=FAINT)
        return figure

    def drawn(self, db: "DuckDBPyConnection", visuals: Sequence[Path], case: "Case") -> "Figure":
        """Draw a case; the folders of `visuals` say what its features stand for."""
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        tables = [path for path in visuals if path.name in case.seen]
        strips = [_strip(db, tables[0], feature, self.images, 72, 5) for feature in case.features] if tables else []
        figure = Figure(figsize=(self.width, 3.0), layout=ConstrainedLayoutEngine(wspace=0.04))
        wide = [1.2, 2.1, 1.5] if strips else [1.2, 1.5]
        grid = figure.add_gridspec(1, len(wide), width_ratios=wide)
        axes = figure.add_subplot(grid[0])
        _show_image(axes, case, tables)
        if case.patches and tables:
            _outline(axes, case.patches, pictures.grid(db, tables[0].name))
        if strips:
            called = _called(db, tables[0].name)
            axes = figure.add_subplot(grid[1])
            head = 26
            height, width = strips[0].image.shape[:2]
            axes.set(xlim=(0, width), ylim=(len(strips) * (height + head), 0), aspect="equal", anchor="N")
            axes.axis("off")
            for i, (feature, strip) in enumerate(zip(case.features, strips, strict=True)):
                top = i * (height + head) + head
                axes.imshow(strip.image, extent=(0, width, top + height, top))
                told = ", ".join(filter(None, (f"feature {feature}", called.get(feature), strip.purity)))
                axes.text(0, top - 6, told, fontsize=7.5, color=FAINT)
            axes.set_title("the features: their strongest images")
        axes = figure.add_subplot(grid[-1])
        likely = np.sort(np.argsort(-np.maximum(case.before, case.after), kind="stable")[: self.classes])
        y = np.arange(len(likely))
        axes.barh(y - 0.2, case.before[likely], 0.38, color=BEFORE, label="before")
        axes.barh(y + 0.2, case.after[likely], 0.38, color=AFTER, label="after")
        axes.set_yticks(y, [case.names[i] for i in likely])
        axes.invert_yaxis()
        all_kept = len(case.names) == case.n_classes
        said = "probability" if all_kept else f"share among {len(case.names)} of {case.n_classes} classes"
        axes.set(xlim=(0, 1.0), xlabel=said, title="what the probe says")
        axes.grid(axis="y", visible=False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=7.5)
        title = f"{case.source} → {case.target}: {case.done}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        return figure


# Reading


class Strip(NamedTuple):
    """The strongest images of a feature side by side."""

    image: Array
    """uint8 [height, width, 3]."""

    purity: str
    """`14 of 16: seven`; empty without classes."""

    largest: float | None
    """The value of the brightest colour; None: no patch is lit."""


def _strip(db: "DuckDBPyConnection", folder: Path, feature: int, n: int, side: int, gap: int) -> Strip:
    rows = db.execute(
        "SELECT t.rank, t.example, c.name FROM top_example t JOIN example e ON e.unit = t.acts AND "
        "e.example = t.example LEFT JOIN class c ON c.unit = e.unit AND c.label = e.label "
        "WHERE t.unit = ? AND t.feature = ? ORDER BY t.rank",
        [folder.name, feature],
    ).fetchall()
    ((largest,),) = db.execute(
        "SELECT max FROM feature WHERE unit = ? AND feature = ?", [folder.name, feature]
    ).fetchall()
    grid, maps_tp = pictures.grid(db, folder.name), pictures.maps(folder / "maps.safetensors", feature)
    views = pictures.read(folder / "picture.parquet", [example for _, example, _ in rows[:n]])
    tiles = [
        np.asarray(pictures.lit(views[example], pictures.on_grid(maps_tp[rank], grid), side))
        for rank, example, _ in rows[:n]
    ]
    height = max((tile.shape[0] for tile in tiles), default=side)
    strip = np.full((height, n * (side + gap) - gap, 3), 255, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        strip[: tile.shape[0], i * (side + gap) : i * (side + gap) + tile.shape[1]] = tile
    most, count = commonest(name for _, _, name in rows)
    purity = "" if most is None else f"{count} of {len(rows)}: {shown(most)}"
    return Strip(strip, purity, largest if maps_tp.shape[1] > 1 else None)


def _called(db: "DuckDBPyConnection", unit: str) -> dict[int, str]:
    """Return what people call the features of a visuals unit's SAE."""
    rows = db.execute(
        "SELECT feature, name FROM note WHERE sae IN (SELECT needs FROM need WHERE unit = ?) AND name != ''", [unit]
    ).fetchall()
    return {feature: shown(name) for feature, name in rows}


class Case(NamedTuple):
    """One edit of an image."""

    example: int

    source: str
    target: str
    done: str
    """What was done, in words."""

    features: list[int]
    names: list[str]
    before: Array
    """Probabilities by name or, where not every class has its logit in the store, shares among those that have."""

    after: Array
    n_classes: int
    seen: set[str]
    """The visuals units that say what its features stand for."""

    view: "Image | None" = None
    """What the model saw."""

    patches: Sequence[int] = ()
    """Those that were edited, if not all."""


def said_of(changes: Sequence[tuple[str, float]], place: str, n_patches: int = 0, raw: bool = False) -> str:
    """Return in words what was done to features (mode and amount of each), on how many patches (0: all).

    Amounts are in units of p99 or, with `raw`, of codes.
    """
    unit = "" if raw else " × p99"
    said = {
        "set": f"set to {{}}{unit}",
        "add": f"raised by {{}}{unit}",
        "scale": "multiplied by {}",
        "ablate": "less {} of it",
    }
    where = "[CLS]" if place == "cls" else f"{n_patches} patches" if n_patches else "every patch"
    kinds = list(dict.fromkeys(changes))
    done = said[kinds[0][0]].format(f"{kinds[0][1]:g}") if len(kinds) == 1 else "edited"
    return f"{len(changes)} feature{'s' * (len(changes) != 1)} {done} on {where}"


def _case(db: "DuckDBPyConnection", folder: Path, edit: int | None) -> Case | None:
    """Return an edit of a steer unit, or its first example: the one that it names, else the surest by the tables."""
    found = db.execute(
        "WITH read AS (SELECT edit, arg_max(label, before) AS was, arg_max(label, after) AS became, "
        "sum(exp(after)) AS total FROM edit_logit WHERE unit = $unit GROUP BY edit) "
        "SELECT e.edit, e.sae, e.acts, e.example, o.name, t.name, e.dose, e.mode, e.place, "
        "coalesce(CAST(u.content->'$.raw' AS BOOLEAN), false), coalesce(CAST(u.content->'$.patches' AS INTEGER[]), []) "
        "FROM edit e JOIN read USING (edit) JOIN unit u ON u.unit = e.unit "
        "JOIN edit_logit l ON l.unit = e.unit AND l.edit = e.edit AND l.label = e.target "
        "JOIN example x ON x.unit = e.acts AND x.example = e.example "
        "JOIN class o ON o.unit = e.acts AND o.label = x.label JOIN class t ON t.unit = e.acts AND t.label = e.target "
        "WHERE e.unit = $unit AND e.chosen_by != 'random directions' AND CASE WHEN $edit IS NULL THEN "
        "e.chosen_by = e.way AND e.role = 'other class' AND was = x.label AND became = e.target "
        "ELSE e.edit = $edit END "
        "ORDER BY exp(l.after) / total DESC, e.edit LIMIT 1",
        {"unit": folder.name, "edit": _first(folder / "first.json") if edit is None else edit},
    ).fetchall()
    if not found:
        return None
    edit, sae, acts, example, source, target, amount, mode, place, raw, patches = found[0]
    features = db.execute(
        "SELECT feature FROM edit_feature WHERE unit = ? AND edit = ? AND feature IS NOT NULL ORDER BY rowid",
        [folder.name, edit],
    ).fetchall()
    logits = db.execute(
        "SELECT c.name, l.before, l.after FROM edit_logit l JOIN class c ON c.unit = ? AND c.label = l.label "
        "WHERE l.unit = ? AND l.edit = ? ORDER BY l.label",
        [acts, folder.name, edit],
    ).fetchall()
    ((n_classes,),) = db.execute("SELECT count(*) FROM class WHERE unit = ?", [acts]).fetchall()
    seen = db.execute("SELECT DISTINCT unit FROM feature WHERE sae = ? AND acts = ?", [sae, acts]).fetchall()
    names, before, after = zip(*logits, strict=True)
    chosen = [feature for (feature,) in features]
    done = said_of([(mode, amount)] * len(chosen), place, len(patches), raw)
    return Case(
        example, shown(source), shown(target), done, chosen,
        list(map(shown, names)), _softmax(before), _softmax(after), n_classes, {unit for (unit,) in seen},
        _kept(folder / "first.png") if edit == _first(folder / "first.json") else None, patches,
    )  # fmt: skip


def _saved(db: "DuckDBPyConnection", store: Path, name: str) -> Case:
    """Return an edit that was saved on the page."""
    found = db.execute(
        "SELECT unit, sae, acts, example, place, patches FROM saved_edit WHERE name = ? ORDER BY unit",
        [name],
    ).fetchone()
    if not found:
        names = [known for (known,) in db.execute("SELECT name FROM saved_edit ORDER BY name").fetchall()]
        near = did_you_mean(name, names) or f" (there are: {', '.join(names[:20]) or 'none'})"
        raise UserError(f"saved: there is no saved edit '{name}'{near}")
    unit, sae, acts, example, place, patches = found
    changes = db.execute(
        "SELECT feature, mode, amount FROM saved_feature WHERE unit = ? ORDER BY rowid", [unit]
    ).fetchall()
    rows = db.execute(
        "SELECT c.name, s.before, s.after FROM saved_class s JOIN class c ON c.unit = ? AND c.label = s.label "
        "WHERE s.unit = ? ORDER BY s.label",
        [acts, unit],
    ).fetchall()
    seen = db.execute("SELECT DISTINCT unit FROM feature WHERE sae = ? AND acts = ?", [sae, acts]).fetchall()
    names, before, after = (list(column) for column in zip(*rows, strict=True))
    names = list(map(shown, names))
    edited = [int(patch) for patch in (patches or "").split()]
    done = said_of([(mode, amount) for _, mode, amount in changes], place, len(edited))
    return Case(
        example, names[int(np.argmax(before))], names[int(np.argmax(after))], done,
        [feature for feature, _, _ in changes], names, np.array(before), np.array(after), len(names),
        {one for (one,) in seen}, _kept(store / SAVED / unit / "view.png"), edited,
    )  # fmt: skip


def _kept(path: Path) -> "Image | None":
    """Return the picture of a case, if somebody kept one."""
    if not path.exists():
        return None
    try:
        return pictures.opened(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete {path.parent} to make it again") from error


def _first(path: Path) -> int | None:
    """Return the edit that a steer unit names as its first example, if it names one."""
    try:
        return number(parsed(path.read_text()).get("edit"), 0, 2**31 - 1, "edit") if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete {path.parent} to make it again") from error


def _show_image(axes: "Axes", case: Case, tables: Sequence[Path]) -> None:
    """Show the image that was edited, as the model saw it, or say that nobody kept it."""
    view = case.view
    if view is None:
        found = [pictures.read(path / "picture.parquet", [case.example]) for path in tables]
        views = [views[case.example] for views in found if case.example in views]
        if not views:
            axes.text(0.5, 0.5, f"image {case.example}\n(no picture is kept)", ha="center", va="center", color=FAINT)
            axes.axis("off")
            return
        view = views[0]
    axes.imshow(np.asarray(pictures.enlarged(view, 256)))
    axes.set(title=f"the image: {case.source}", anchor="N")
    axes.axis("off")


def _outline(axes: "Axes", patches: Sequence[int], grid: tuple[int, int]) -> None:
    """Draw frames around patches of the image that is shown, if one is."""
    from matplotlib.patches import Rectangle

    for image in axes.images:
        left, right, bottom, top = image.get_extent()
        height, width = (bottom - top) / grid[0], (right - left) / grid[1]
        for patch in patches:
            row, column = divmod(patch, grid[1])
            where = left + column * width, top + row * height
            axes.add_patch(Rectangle(where, width, height, fill=False, edgecolor=AFTER, linewidth=1.5))


def _softmax(logits: Sequence[float]) -> Array:
    powers = np.exp(np.array(logits) - max(logits))
    shares: Array = powers / powers.sum()
    return shares


@hookimpl
def saefw_figures() -> list[type[FigureConfig]]:
    """Two: feature-grid, before-after."""
    return [FeatureGrid, BeforeAfter]
