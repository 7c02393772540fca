"""An experiment in a notebook: open it, take an image, edit its features, look.

    experiment = open_experiment("registry.yaml")
    image = experiment.image(experiment.first.example)
    image.features()
    image.edit({7: 2.0}).probabilities

What is returned shows itself where a notebook shows the last value of a cell. Shapes: c classes.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

from saefw.experiment.choices import choices
from saefw.experiment.opened import Change, Experiment, Floats, opened, probabilities
from saefw.pictures import enlarged, png
from saefw.plugin import UserError
from saefw.steering import MODES, Edit, Together

BEFORE, AFTER = "#b4b8c1", "#0072B2"

SIDE, CLASSES = 224, 10
"""Pixels of the longer side of an image; classes that are shown of many, the likeliest."""


def open_experiment(
    registry: str | Path = "registry.yaml",
    dataset: str | None = None,
    sae: str | None = None,
    probe: str | None = None,
) -> "Notebook":
    """Open an SAE with a probe, by default those that the steer stage edited.

    Args:
        registry: the file that they were planned from.
        dataset: the name of the probe's dataset, where several were steered; None: the first.
        sae: the address of another SAE of the stage.
        probe: the address of another probe of the stage.

    Raises:
        UserError: the registry cannot be read, or nothing is made; the text says what to do.

    """
    made = choices(Path(registry))
    found = {choice.unit.needs[4].given["names"]["dataset"]: choice for choice in reversed(made)}
    if dataset is not None and dataset not in found:
        raise UserError(f"{registry}: '{dataset}' is not steered (there are: {', '.join(sorted(found))})")
    choice = made[0] if dataset is None else found[dataset]
    if sae is not None or probe is not None:
        choice = choice.other(sae or choice.sae.address, probe or choice.probe.address)
    return Notebook(opened(choice))


class Notebook:
    """An experiment, by what a notebook asks of it."""

    def __init__(self, experiment: Experiment) -> None:
        """Show this one."""
        self.experiment = experiment
        self.classes = experiment.classes
        """Names of the classes, by label."""
        self.examples: list[int] = experiment.test.tolist()
        """The labelled test images, by number."""
        self.first = experiment.first
        """The stored first example, if an edit turned an answer."""

    def image(self, which: int | str) -> "Shot":
        """Return an image, by its number or by its key.

        Raises:
            UserError: there is none, or it has no picture to read.

        """
        keys = self.experiment.acts.keys
        if isinstance(which, str):
            if which not in keys:
                raise UserError(
                    f"image: there is no '{which}' (they are called like '{self.experiment.key(self.examples[0])}')"
                )
            which = keys.index(which)
        if not 0 <= which < len(keys):
            raise UserError(f"image: there is no {which} (there are: 0 to {len(keys) - 1})")
        return Shot(self.experiment, which)

    def features_of(self, name: str, n: int = 10) -> "Features":
        """Return the features of largest predicted effect on a class.

        Raises:
            UserError: there is no such class.

        """
        if name not in self.classes:
            raise UserError(f"class: there is no '{name}' (there are: {', '.join(self.classes[:20])})")
        return Features(self.experiment, self.experiment.strong(self.classes.index(name), n))


@dataclass(frozen=True)
class Shot:
    """An image before any edit; its codes are computed once and kept."""

    experiment: Experiment
    example: int

    @property
    def probabilities(self) -> dict[str, float]:
        """What the probe says, by class."""
        return _named(self.experiment, self.experiment.seen(self.example).probability_c(self.experiment.place))

    def features(self, n: int = 10) -> "Features":
        """Return the features that are strongest in the image."""
        return Features(self.experiment, self.experiment.firing(self.experiment.seen(self.example))[:n])

    def edit(
        self,
        amounts: Mapping[int, float],
        mode: str | Mapping[int, str] = "set",
        patches: Sequence[int] | None = None,
        raw: bool = False,
        place: str | None = None,
        directly: bool = False,
    ) -> "Edited":
        """Edit features and run the rest of the backbone.

        Args:
            amounts: by feature, the amount: in units of its p99; a factor with mode `scale`, a share with `ablate`.
            mode: `set`, `add`, `scale` or `ablate`, of all or by feature.
            patches: which to edit, row by row from 0; None: all. Edits of [CLS] have none.
            raw: amounts are in the units of codes.
            place: the tokens that are edited, `patches` or `cls`; None: those that the stage edits.
            directly: past the blocks, into the tokens that the probe reads.

        Raises:
            UserError: there is no such mode, feature, place or patch; or the edit cannot go straight into the probe.

        """
        step = self._step(self.experiment, amounts, mode, patches, raw, place)
        seen = self.experiment.seen(self.example)
        after = self.experiment.edit(seen, step.changes, step.place, patches, directly, raw)
        return Edited(self, [] if directly else [step], step.place, after.probability_c)

    def _step(
        self,
        experiment: Experiment,
        amounts: Mapping[int, float],
        mode: str | Mapping[int, str],
        patches: Sequence[int] | None,
        raw: bool,
        place: str | None,
    ) -> "Step":
        """Return what is asked of an SAE, once it is checked."""
        seen, place = experiment.seen(self.example), place or experiment.place
        if place not in experiment.steerings:
            raise UserError(f"place: there is no '{place}' (there are: {', '.join(experiment.steerings)})")
        n, modes = len(seen.edited(place)), {f: mode if isinstance(mode, str) else mode.get(f, "set") for f in amounts}
        for named in modes.values() if amounts else [mode]:
            if named not in MODES:
                raise UserError(f"mode: there is no '{named}' (there are: {', '.join(MODES)})")
        for feature in amounts:
            if feature not in experiment.about:
                raise UserError(f"feature {feature}: none of this number fires on the training images")
        for patch in patches or ():
            if place == "cls" or not 0 <= patch < n:
                there = "none: edits are on [CLS]" if place == "cls" else f"0 to {n - 1}"
                raise UserError(f"patches: there is no {patch} (there are: {there})")
        changes = [Change(feature, modes[feature], amount) for feature, amount in amounts.items()]
        return Step(experiment, place, changes, experiment.edits(changes, place, patches, raw))

    def _repr_png_(self) -> bytes:
        return png(enlarged(self.experiment.view(self.example), SIDE))


@dataclass(frozen=True)
class Features:
    """Some features, each with its strongest images."""

    experiment: Experiment
    numbers: list[int]

    def _repr_html_(self) -> str:
        rows, names = [], self.experiment.called()
        for feature in self.numbers:
            about = self.experiment.about[feature]
            name = escape(self.experiment.classes[about.label]) if about.label >= 0 else "no class"
            called = f" · {escape(names[feature])}" if feature in names else ""
            images = "".join(f'<img src="{uri}" alt="" height="64"> ' for uri, _ in self.experiment.thumbnails(feature))
            rows.append(
                f"<tr><td>{feature}{called}</td><td>{about.n_label} of {self.experiment.top}: {name}</td>"
                f"<td>{100 * about.frequency:.2g} % of {self.experiment.counted}</td><td>{images}</td></tr>"
            )
        head = "<tr><th>feature</th><th>strongest images</th><th>fires on</th><th></th></tr>"
        return f"<table>{head}{''.join(rows)}</table>"


class Step(NamedTuple):
    """What is done to features of one SAE."""

    experiment: Experiment
    place: str
    changes: list[Change]
    edits: list[Edit]


@dataclass(frozen=True)
class Edited:
    """An image after an edit."""

    before: Shot
    steps: list[Step]
    """What was done, SAE by SAE; nothing of an edit straight into the probe."""

    place: str
    """The tokens that were edited first."""

    probability_c: Floats
    """float64 [c]."""

    @property
    def probabilities(self) -> dict[str, float]:
        """What the probe says, by class."""
        return _named(self.before.experiment, self.probability_c)

    def also(
        self,
        other: Notebook,
        amounts: Mapping[int, float],
        mode: str | Mapping[int, str] = "set",
        patches: Sequence[int] | None = None,
        raw: bool = False,
        place: str | None = None,
    ) -> "Edited":
        """Edit features of another SAE too, of the same or another block, in one pass with what is edited already.

        Args:
            other: the other SAE, opened with the same probe.
            amounts: these and the others as in `Shot.edit`.
            mode: see there.
            patches: see there.
            raw: see there.
            place: see there.

        Raises:
            UserError: as there; or another probe reads the other SAE, or this edit went straight into the probe.

        """
        one, choice = self.before.experiment.choice, other.experiment.choice
        if choice.probe != one.probe:
            raise UserError(f"also: the other SAE is read by {choice.probe.label}, this one by {one.probe.label}")
        if not self.steps:
            raise UserError("also: an edit straight into the probe stands alone")
        steps = [*self.steps, self.before._step(other.experiment, amounts, mode, patches, raw, place)]
        together = Together([step.experiment.steerings[step.place] for step in steps])
        first = min((step.experiment for step in steps), key=lambda experiment: experiment.acts.layer)
        readings = together.reading(first.tokens(self.before.example))
        logits_bc = together.edit(readings, [step.edits for step in steps])
        return Edited(self.before, steps, self.place, probabilities(logits_bc[0]))

    def _repr_html_(self) -> str:
        experiment = self.before.experiment
        was = _named(experiment, experiment.seen(self.before.example).probability_c(self.place))
        now = self.probabilities
        likely = sorted(was, key=lambda name: -max(was[name], now[name]))[:CLASSES]
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{_bar(was[name], BEFORE)}</td><td>{_bar(now[name], AFTER)}</td></tr>"
            for name in was
            if name in likely
        )
        shot = b64encode(self.before._repr_png_()).decode()
        return (
            f'<img src="data:image/png;base64,{shot}" alt="">'
            f"<table><tr><th>class</th><th>before</th><th>after</th></tr>{rows}</table>"
        )


def _named(experiment: Experiment, probability_c: Floats) -> dict[str, float]:
    return dict(zip(experiment.classes, probability_c.tolist(), strict=True))


def _bar(share: float, colour: str) -> str:
    bar = f'<span style="display:inline-block;height:10px;width:{120 * share:.0f}px;background:{colour}"></span>'
    return f"{bar} {100 * share:.1f} %"
