"""Reads what the steering page shows: one steer unit with its models, its tables and its pictures.

Shapes: p patches, s d_sae, c classes; images one at a time.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from saefw import pictures, pipeline, registry, tensors
from saefw.catalog import Catalog
from saefw.controls import strongest
from saefw.errors import escaped
from saefw.inputs import called
from saefw.live import acts_of
from saefw.originals import again
from saefw.plugin import Entry, Run, Unit, UserError, settings
from saefw.stages.readers import opened as opened_probe
from saefw.stages.steer import Steer
from saefw.stages.steer_plan import GRADIENT, gradient_form
from saefw.stages.visuals import MAPS, PICTURES
from saefw.steering import FACTORS, Edit, Reading, Steering
from saefw.trained import open_sae

if TYPE_CHECKING:
    from PIL.Image import Image

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

THUMBNAILS, SIDE = 5, 96
"""Example pictures of a feature, and the pixels of their longer side."""


@dataclass(frozen=True)
class Choice:
    """A steer unit that is made; what is opened for it is shared by all sessions."""

    registry: Path
    """The registry that it was planned from."""

    store: Path
    """Where it is kept."""

    unit: Unit

    run: Run = field(compare=False)
    """The desk from which it is read."""


def choices(path: Path) -> list[Choice]:
    """List the steer units of a registry that are made.

    Raises:
        UserError: the registry cannot be read, or there is none; the text says what to do.

    """
    catalog = Catalog()
    read = registry.read(path, catalog)
    names = [name for name, members in read.families["stages"].items() if isinstance(members[0].entry, Steer)]
    if not names:
        raise UserError(
            f"{path} has no stage with use: steer, which this page shows; add one and run `saefw run {path}`."
        )
    run = pipeline.desk(read, catalog)
    plans = [plan for plan in pipeline.plan(read, catalog, only=names[-1], run=run) if plan.name in names]
    made = [Choice(path.resolve(), read.store, unit, run) for plan in plans for unit in plan.kept]
    if not made:
        raise UserError(f"Nothing is made yet that could be steered: run `saefw run {path}` first.")
    return made


class Seen(NamedTuple):
    """An image as the models see it, before any edit."""

    reading: Reading
    """Of this image alone."""

    probability_c: Floats
    """What the probe says."""

    patch_ps: NDArray[np.float32]
    """Codes of the patches."""

    edited_ps: NDArray[np.float32]
    """Codes of the tokens that edits change: the patches, or [CLS] alone."""


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


class First(NamedTuple):
    """The stored example to begin with."""

    example: int
    own: int
    target: int
    features: list[int]
    amount: float


@lru_cache(maxsize=4)
def opened(choice: Choice) -> "Experiment":
    """Open what a steer unit needs, once a process."""
    return Experiment(choice.unit, choice.run)


class Experiment:
    """A steer unit, its models loaded, its tables read."""

    def __init__(self, unit: Unit, run: Run) -> None:
        """Load models and tables; DuckDB is open for that long only.

        Raises:
            UserError: something that it is made of is damaged.

        """
        sae, probe, _, classes, recording = unit.needs
        run.check(unit, sae, probe)  # what is small; a recording may be a terabyte
        self.unit, self._looks = unit, run.folder(classes)
        self.acts = acts_of(recording, run)
        self.counted = "images" if sae.content["tokens"] == "cls" else "patches"
        self.place, self.mode = str(unit.content["place"]), str(unit.content["mode"])
        self.amounts = [float(amount) for amount in unit.content["amounts"]]
        # Escaped as for any other eye: HTML would show an override of the direction of writing by obeying it.
        self.classes, self.keys = list(map(escaped, self.acts.classes)), list(map(escaped, self.acts.keys))
        self.labels = self.acts.labels
        self.steering = Steering(
            recording.given["backbone"].build(run.device),
            open_sae(sae.given["sae"], run.folder(sae), run.device),
            opened_probe(probe, run),
            self.acts.layer,
            probe.needs[0].content["layer"],
            self.place,
            bool(unit.content["keep_error"]),
            probe.content["token"],
        )
        self._device = run.device
        self._images = run.dataset(recording.given["dataset"])
        self.about = _about(unit, run)
        test = self.acts.of_split("test")
        self.test: Ints = test[self.labels[test] >= 0]
        self.predicted = _predicted(probe, run)
        self.title, self.subtitle = _title(unit, run, self.acts.layer)
        self._by_effect_cf = self._by_effect(run.folder(unit))
        self.first = _first(run.folder(unit), self.acts.classes)
        self.top = int(classes.content["top"])
        self.seen = lru_cache(maxsize=32)(self._seen)
        self.view = lru_cache(maxsize=32)(self._view)
        self.thumbnails = lru_cache(maxsize=512)(self._thumbnails)

    def of_class(self, label: int) -> Ints:
        """Return the test images of a class."""
        found: Ints = self.test[self.labels[self.test] == label]
        return found

    def strong(self, label: int, n: int) -> list[int]:
        """Return the features with the largest predicted effect on a class's logit, as the steer stage chose them."""
        return [int(feature) for feature in self._by_effect_cf[label][:n]]

    def firing(self, example: int) -> list[int]:
        """Return the features that fire in an image and tell it from others, the largest value first."""
        most_s = self.seen(example).edited_ps.max(axis=0)
        usual = [s for s in np.argsort(-most_s, kind="stable") if most_s[s] > 0 and s in self.about]
        return [int(s) for s in usual if self.about[s].frequency < self.unit.content["max_frequency"]]

    def edit(
        self, example: int, edits: dict[int, float], mode: str, patches: Sequence[int] | None, raw: bool = False
    ) -> Floats:
        """Return the probabilities [c] after an edit.

        Args:
            example: which image.
            edits: by feature, the amount: in units of its p99, or a factor with mode `scale`, a share with `ablate`.
            mode: `set`, `add`, `scale` or `ablate`.
            patches: which to edit; null: all.
            raw: amounts are in the units of codes.

        """
        some = None if self.place == "cls" else patches
        asked = [Edit(s, mode, x if raw or mode in FACTORS else x * self.about[s].p99, some) for s, x in edits.items()]
        return probabilities(self.steering.edit(self.seen(example).reading, asked)[0])

    @torch.no_grad()
    def _seen(self, example: int) -> Seen:
        ((_, tokens_1td),) = self.acts.read("all", np.array([example]))
        tokens_1td = tokens_1td.to(self._device)
        reading = self.steering.reading(tokens_1td)
        codes_ts = self.steering.sae.dense(tokens_1td[0]).cpu().numpy()
        return Seen(
            reading,
            probabilities(reading.logits_bc[0]),
            codes_ts[self.acts.n_prefix :],
            codes_ts[self.steering.edited],
        )

    def _view(self, example: int) -> "Image":
        image = again(self._images, example, self.acts.keys[example])
        return self.steering.backbone.view(image).convert("RGB")

    def _thumbnails(self, feature: int) -> list[tuple[str, int]]:
        """Return the feature's top images with its patches lit, as data URIs, and which they are."""
        examples = self.about[feature].top[:THUMBNAILS].tolist()
        views = pictures.read(self._looks / PICTURES, examples)
        maps_tp, grid = pictures.maps(self._looks / MAPS, feature), self.acts.grid
        lit = [pictures.lit(views[e], pictures.on_grid(maps_tp[i], grid), SIDE) for i, e in enumerate(examples)]
        return [
            ("data:image/png;base64," + b64encode(pictures.png(x)).decode(), e)
            for x, e in zip(lit, examples, strict=True)
        ]

    def _by_effect(self, folder: Path) -> Ints:
        form = gradient_form(len(self.classes), self.acts.d_model)
        try:
            found, _ = tensors.read(folder / GRADIENT)
            tensors.check(found, form)
        except ValueError as error:
            raise UserError(
                f"{folder / GRADIENT}: cannot be read ({error}); delete {folder} to make it again"
            ) from error
        gradient_cd = found["gradient"]
        frequency_s, p99_s = np.zeros(self.steering.sae.d_sae), np.zeros(self.steering.sae.d_sae)
        for s, about in self.about.items():
            frequency_s[s], p99_s[s] = about.frequency, about.p99
        effect_sc = self.steering.effects(gradient_cd, torch.from_numpy(p99_s)).numpy()
        usable_s = (frequency_s > 0) & (frequency_s < self.unit.content["max_frequency"]) & (p99_s > 0)
        return strongest(effect_sc, usable_s, min(64, int(usable_s.sum())))


def probabilities(logits_c: torch.Tensor) -> Floats:
    """Return the softmax of logits, in float64."""
    found: Floats = torch.softmax(logits_c.double().cpu(), dim=0).numpy()
    return found


# What the tables say


def _about(unit: Unit, run: Run) -> dict[int, About]:
    """Return what is known of each feature that fires."""
    with run.store.db() as db:
        told = db.execute(
            "SELECT feature, frequency, p99 FROM feature WHERE unit = ? AND frequency > 0 ORDER BY feature",
            [unit.needs[2].address],
        ).fetchall()
        tops = db.execute(
            "SELECT feature, list(example ORDER BY rank) FROM top_example WHERE unit = ? GROUP BY feature",
            [unit.needs[3].address],
        ).fetchall()
        counts = db.execute(
            "SELECT feature, arg_max(label, (n, -label)), max(n) FROM (SELECT feature, label, count(*) AS n "
            "FROM top_example t JOIN example e ON e.unit = t.acts AND e.example = t.example "
            "WHERE t.unit = ? AND label >= 0 GROUP BY ALL) GROUP BY feature",
            [unit.needs[3].address],
        ).fetchall()
    top = {feature: np.array(examples, dtype=np.int64) for feature, examples in tops}
    named = {feature: (label, n) for feature, label, n in counts}
    none = np.array([], dtype=np.int64)
    return {
        feature: About(frequency, p99, *named.get(feature, (-1, 0)), top.get(feature, none))
        for feature, frequency, p99 in told
    }


def _predicted(probe: Unit, run: Run) -> dict[int, int]:
    """Return what the probe takes each test image for."""
    with run.store.db() as db:
        rows = db.execute("SELECT example, predicted FROM prediction WHERE unit = ?", [probe.address]).fetchall()
    return dict(rows)


def _title(unit: Unit, run: Run, layer: int) -> tuple[str, str]:
    """Return the experiment's name, and a line on its SAE and its probe."""
    sae, probe, _, _, recording = unit.needs
    with run.store.db() as db:
        rows = db.execute(
            "SELECT unit, name, value FROM final WHERE unit IN (?, ?)", [sae.address, probe.address]
        ).fetchall()
    measured: dict[tuple[str, str], float] = {(who, name): value for who, name, value in rows}

    def told(who: Unit, name: str, called: str, form: str) -> list[str]:
        value = measured.get((who.address, name))
        return [] if value is None else [f"{called} {value:{form}}".replace("%", " %")]

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


def _first(folder: Path, classes: Sequence[str]) -> First | None:
    """Return the steer stage's first example; none if no edit turned a right answer."""
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
