"""What the tables say of an experiment: its features, its title, the edits that show its point.

Shapes: s d_sae.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saefw import tensors
from saefw.inputs import called
from saefw.plugin import Entry, Run, Unit, UserError, settings

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class About(NamedTuple):
    """What the tables say of a feature."""

    frequency: float
    """Share of patches on which it fires; of images, for a feature of [CLS]."""

    p99: float
    """In the units of codes."""

    label: int
    """The commonest class among its top images; -1: none."""

    n_label: int
    """How many of them are of it."""

    top: Ints
    """Its top images, the strongest first."""


class Features(Mapping[int, About]):
    """The features that fire; top images are asked for when somebody looks at the feature."""

    def __init__(self, run: Run, tables: Unit, classes: Unit, d_sae: int, labels: Ints) -> None:
        """Read how often and how strongly each fires."""
        self._run, self._classes, self._labels = run, classes.address, labels
        self.frequency_s, self.p99_s = np.zeros(d_sae), np.zeros(d_sae)
        with run.store.db() as db:
            told = db.execute(
                "SELECT feature, frequency, p99 FROM feature WHERE unit = ? AND frequency > 0", [tables.address]
            ).fetchnumpy()
        self.frequency_s[told["feature"]] = np.ma.filled(told["frequency"], 0)
        self.p99_s[told["feature"]] = np.ma.filled(told["p99"], 0)
        self._known: dict[int, About] = {}

    def __contains__(self, feature: object) -> bool:
        return isinstance(feature, int) and 0 <= feature < len(self.frequency_s) and self.frequency_s[feature] > 0

    def __iter__(self) -> Iterator[int]:
        return map(int, np.flatnonzero(self.frequency_s))

    def __len__(self) -> int:
        return int(np.count_nonzero(self.frequency_s))

    def __getitem__(self, feature: int) -> About:
        if feature not in self:
            raise KeyError(feature)
        if feature not in self._known:
            self.load([feature])
        return self._known[feature]

    def load(self, features: Iterable[int]) -> None:
        """Read the top images of several features at once."""
        wanted = [feature for feature in features if feature in self and feature not in self._known]
        if not wanted:
            return
        with self._run.store.db() as db:
            rows = db.execute(
                "SELECT feature, list(example ORDER BY rank) FROM top_example WHERE unit = ? "
                "AND list_contains(?, feature) GROUP BY feature",
                [self._classes, wanted],
            ).fetchall()
        tops = dict(rows)
        for feature in wanted:
            top = np.array(tops.get(feature, []), dtype=np.int64)
            labels = self._labels[top]
            counts = np.bincount(labels[labels >= 0], minlength=1)
            label = int(counts.argmax()) if counts.any() else -1
            self._known[feature] = About(
                float(self.frequency_s[feature]), float(self.p99_s[feature]), label, int(counts.max()), top
            )


class First(NamedTuple):
    """The stored example to begin with."""

    example: int
    own: int
    target: int
    features: list[int]
    amount: float


class Guide(NamedTuple):
    """An edit that shows the point of the experiment."""

    name: str
    """`turn`, `control` or `back`."""

    example: int
    own: int
    target: int
    features: list[int]
    amount: float


def first_of(folder: Path, classes: Sequence[str]) -> First | None:
    """Return the steer stage's first example; none if no edit turned a right answer.

    Raises:
        UserError: the file is not what the stage wrote.

    """
    path = folder / "first.json"
    if not path.exists():
        return None
    try:
        told = tensors.parsed(path.read_text())
        return First(
            int(told["example"]),
            classes.index(told["from"]),
            classes.index(told["to"]),
            [int(feature) for feature in told["features"]],
            float(told["amount"]),
        )
    except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete {folder} to make it again") from error


def guides_of(unit: Unit, run: Run, first: First) -> list[Guide]:
    """Return the first example, its control by features of like frequency, and the surest edit the other way round.

    The last two are read off the stored edits; one that is not there is left out.
    """
    guides = [Guide("turn", *first)]
    with run.store.db() as db:
        ways = db.execute(
            "SELECT DISTINCT way FROM edit WHERE unit = ? AND example = ? AND target = ? AND role = 'other class'",
            [unit.address, first.example, first.target],
        ).fetchall()
        for name, own, target, example, controls in (
            ("control", first.own, first.target, first.example, True),
            ("back", first.target, first.own, None, False),
        ):
            found = db.execute(
                "SELECT e.edit, e.example FROM edit e JOIN example x ON x.unit = e.acts AND x.example = e.example "
                "WHERE e.unit = $unit AND x.label = $own AND e.target = $target AND e.role = 'other class' "
                "AND e.way = $way AND e.chosen_by = $by AND abs(e.dose - $dose) < 1e-6 "
                "AND ($example IS NULL OR e.example = $example) ORDER BY e.after DESC, e.edit LIMIT 1",
                {
                    "unit": unit.address,
                    "own": own,
                    "target": target,
                    "way": "effect" if ("effect",) in ways else ways[0][0] if ways else "",
                    "by": "like features" if controls else "effect" if ("effect",) in ways else "",
                    "dose": first.amount,
                    "example": example,
                },
            ).fetchone()
            if found:
                features = db.execute(
                    "SELECT feature FROM edit_feature WHERE unit = ? AND edit = ? AND feature IS NOT NULL",
                    [unit.address, found[0]],
                ).fetchall()
                guides.append(Guide(name, found[1], own, target, [f for (f,) in features], first.amount))
    return guides


def title_of(unit: Unit, run: Run, layer: int) -> tuple[str, str]:
    """Return the experiment's name, and a line on its SAE and its probe."""
    sae, probe, _, _, recording = unit.needs
    with run.store.db() as db:
        rows = db.execute(
            "SELECT unit, name, value FROM final WHERE unit IN (?, ?)", [sae.address, probe.address]
        ).fetchall()
    measured: dict[tuple[str, str], float] = {(who, name): value for who, name, value in rows}

    def told(who: Unit, name: str, title: str, form: str) -> list[str]:
        value = measured.get((who.address, name))
        return [] if value is None else [f"{title} {value:{form}}".replace("%", " %")]

    def chosen(entry: Entry, *keys: str) -> list[str]:
        given = settings(entry)
        return [f"{key.replace('_', ' ')} {given[key]:g}" for key in keys if isinstance(given.get(key), int | float)]

    variant, reader = sae.given["sae"], probe.given["probe"]
    short = [
        *chosen(variant, "k", "l1", "expansion", "d_sae", "lr"),
        *told(sae, "l0", "L0", ".3g"),
        *told(sae, "nmse", "NMSE", ".2g"),
    ]
    learnt = [*chosen(reader, "lr", "weight_decay"), *told(probe, "test_accuracy", "test accuracy", ".1%")]
    names: dict[str, Any] = recording.given.get("names", {})
    title = f"{names.get('dataset', recording.label)} · {names.get('backbone', '')}".rstrip(" ·")
    parts = [
        f"SAE {variant.use} on {sae.content['tokens']} of layer {layer}: {', '.join(short)}",
        f"probe {reader.use} on {called(probe.content['token'])}: {', '.join(learnt)}",
    ]
    return title, " — ".join(parts)
