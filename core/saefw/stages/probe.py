"""Fits every probe of a sweep at once; saves and reopens them.

Shapes: n images, d width of what the probe reads, c classes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy

from saefw import inputs, samples, sealed
from saefw import tensors as files
from saefw.acts import Acts
from saefw.blocks import resolve
from saefw.calibration import Bin, expected_error, reliability
from saefw.care import write_atomically
from saefw.inputs import Token
from saefw.live import acts_of
from saefw.origin import whose
from saefw.outcome import bootstrap
from saefw.pace import ENOUGH
from saefw.plugin import (
    Backbone,
    BackboneConfig,
    DatasetConfig,
    Names,
    Pace,
    Probe,
    ProbeConfig,
    Run,
    StageConfig,
    Task,
    Unit,
    UserError,
    hookimpl,
    settings,
)
from saefw.unit import canonical
from saefw.wording import got

FILE = "probe.safetensors"
FITTED = "fitted.safetensors"
"""In the folder of the last of the probes fitted together, until that is kept: the state of each, by address."""

BATCH = 8192
"""How many tokens are measured at once."""


class ProbeStage(StageConfig):
    """Fits probes on the train split of a recording; valid is there to choose by, test to report on."""

    use: Literal["probe"] = "probe"
    revision: ClassVar[int] = 2

    acts: Annotated[str, Names("stages")]
    """The stage that recorded the activations."""

    layer: int = -1
    """Which of the recorded layers, negative ones from the end."""

    token: Token = "cls"
    """What the probe reads: `cls`, the [CLS] token; `mean`, the mean of all patches; a number, that patch, counted row
    by row from 0; `embedding`, the image embedding that the backbone makes of the last block's output."""

    probes: Annotated[list[str], Names("probes")] = Field(min_length=1)
    """The probes to fit."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit for each recording of the layer and probe.

        Raises:
            UserError: the layer was not recorded, there is no such token to read, a probe cannot read it, or there are
                fewer than two classes.

        """
        units = run.made_by(self.acts, "record")
        recordings = [unit for unit in units if unit.content["layer"] == resolve(self.layer, depth(unit))]
        if not recordings:
            layers = ", ".join(map(str, sorted({unit.content["layer"] for unit in units})))
            raise UserError(f"probe: layer {self.layer} is not recorded by '{self.acts}' (there are: {layers})")
        for unit in recordings:
            inputs.check_input("probe", unit, self.token)
        # Names are not hashed, and the layer is that of the recording: renaming either makes nothing anew.
        shared = {"revision": self.revision, "token": self.token}
        listed = {
            Unit(
                "probe",
                {**shared, "probe": member.entry.content()},
                needs=(acts,),
                label=f"{member.label} on {acts.label}",
                given={"probe": member.entry},
            ): None
            for acts in recordings
            for member in run.family("probes", self.probes)
        }
        for unit in (unit for unit in listed if not run.store.has(unit)):
            (acts,) = unit.needs
            try:
                dataset = run.dataset(acts.given["dataset"])
            except UserError:  # what needs no images goes on without them
                continue
            _tellable(acts, dataset.classes)
            backbone = cast(BackboneConfig, acts.given["backbone"])
            task = Task(inputs.width(backbone.describe(), self.token), tuple(dataset.classes))
            cast(ProbeConfig, unit.given["probe"]).check(task, backbone, self.token)
        yield from listed

    def duration(self, units: Sequence[Unit], run: Run, pace: Pace) -> float:
        """Return the seconds of fitting each recording's probes together, tried for a moment on made-up tokens."""
        total = 0.0
        for (acts, kind), group in _groups(units).items():
            dataset = run.dataset(cast(DatasetConfig, acts.given["dataset"]))
            task = Task(inputs.width(samples.shape(acts), self.token), tuple(dataset.classes))
            members = [unit.given["probe"] for unit in group]
            n = min(samples.sizes(acts, run)["train"], BATCH)
            what = f"{len(group)} {members[0].use} probes on {n} tokens of {acts.label}"
            total += pace(what, partial(_fit_seconds, kind, members, task, n, run.device))
            total += samples.reading(pace, acts, run, samples.sizes(acts, run).total())
        return total

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Fit all probes of one class and recording together; measure and keep each.

        Raises:
            UserError: a split has no labelled images, or there are fewer than two classes.

        """
        for (acts, kind), group in _groups(units).items():
            self._fit(run, acts, kind, group)

    def _fit(self, run: Run, acts: Unit, kind: type[ProbeConfig], units: Sequence[Unit]) -> None:
        recording = acts_of(acts, run)
        given = cast(BackboneConfig, acts.given["backbone"])
        # Loaded once, and only for those that ask for it.
        backbone: Callable[[], Backbone] = cache(lambda: given.fresh(run.device))
        task = Task(inputs.width(given.describe(), self.token), tuple(recording.classes), backbone)
        _tellable(acts, task.classes)
        splits = {
            split: _labelled(recording, split, acts.label, self.token, task, run.device)
            for split in ("train", "valid", "test")
        }
        members = [unit.given["probe"] for unit in units]
        probes = _fitted(run, kind, units, task, splits["train"])
        for unit, config, probe in zip(units, members, probes, strict=True):
            probe = probe.to(run.device).eval().requires_grad_(False)
            _check_logits(probe, splits["valid"].x_nd[:2], len(task.classes))
            measured = {split: measure(probe, data, f"{unit.label}, {split}") for split, data in splits.items()}
            test = measured["test"]
            low, high = bootstrap(test.right_n[:, None].astype(np.float64), 0)
            bins = reliability(test.confidence_n, test.right_n)
            run.log(
                unit,
                0,
                **{f"{split}_accuracy": m.accuracy for split, m in measured.items()},
                **{f"{split}_loss": m.loss for split, m in measured.items()},
                **{f"n_{split}": len(data.examples) for split, data in splits.items()},
                test_accuracy_low=float(low[0]),
                test_accuracy_high=float(high[0]),
                test_ece=expected_error(bins),
            )
            header = {
                "config": config.content(),
                "backbone": given.content(),
                "acts": acts.address,
                "layer": recording.layer,
                "token": self.token,
            }
            state = {name: value.detach().cpu().contiguous() for name, value in probe.state_dict().items()}
            write_atomically(run.folder(unit) / FILE, save(state, {"saefw": canonical(header)}))
            told = canonical(settings(config))
            run.put(unit, "probe", acts=acts.address, variant=config.use, config=told)
            run.put(
                unit,
                "prediction",
                acts=acts.address,
                example=splits["test"].examples,
                predicted=test.predicted_n,
                margin=test.margin_n,
                confidence=test.confidence_n,
            )
            columns = zip(*bins, strict=True)
            run.put(unit, "calibration", **{name: list(x) for name, x in zip(Bin._fields, columns, strict=True)})
            run.keep(unit, without=[FITTED])


def _tellable(acts: Unit, classes: Sequence[str]) -> None:
    if len(classes) < 2:
        found = f"{len(classes)} class{'' if len(classes) == 1 else 'es'}"
        raise UserError(f"{acts.label}: has {found}; a probe tells two or more apart")


def _groups(units: Sequence[Unit]) -> dict[tuple[Unit, type[ProbeConfig]], list[Unit]]:
    """Return the units of each recording and class of probe, which are fitted together."""
    groups: dict[tuple[Unit, type[ProbeConfig]], list[Unit]] = {}
    for unit in units:
        groups.setdefault((unit.needs[0], type(unit.given["probe"])), []).append(unit)
    return groups


class _Enough(Exception):
    """Ends a fit that was watched for long enough."""


def _fit_seconds(kind: type[ProbeConfig], members: Sequence[ProbeConfig], task: Task, n: int, device: str) -> float:
    """Return the seconds of a fit, by how far it is after a moment; nan if there is nothing to fit to."""
    if not n or len(task.classes) < 2:
        return math.nan
    x_nd, y_n = torch.randn(n, task.d_model, device=device), torch.arange(n, device=device) % len(task.classes)
    start = first = perf_counter()
    left = 0.0

    def done(steps: int, total: int) -> None:
        # The first step, which loads what it needs, does not count.
        nonlocal first, left
        now = perf_counter()
        if steps == 1:
            first = now
        elif now - first > ENOUGH:
            left = (now - first) / (steps - 1) * total
            raise _Enough

    try:
        kind.fit_many(members, task, x_nd, y_n, done)
    except _Enough:
        return left
    except UserError:  # it asks the backbone, which is not built to guess a time
        return math.nan
    return perf_counter() - start


class Labelled(NamedTuple):
    """What a probe reads of the labelled images of a split."""

    examples: np.ndarray[tuple[int], np.dtype[np.int64]]
    """Which images."""

    x_nd: Tensor
    """float32 [n, d]."""

    y_n: Tensor
    """int64 [n], the images' classes."""


class Measured(NamedTuple):
    """How a probe does on a split."""

    accuracy: float
    """Share of images whose largest logit is that of their class."""

    loss: float
    """Mean cross-entropy in nats, summed in float64."""

    predicted_n: np.ndarray[tuple[int], np.dtype[np.int64]]
    """The class of the largest logit."""

    margin_n: np.ndarray[tuple[int], np.dtype[np.float32]]
    """The largest logit minus the second."""

    confidence_n: np.ndarray[tuple[int], np.dtype[np.float64]]
    """The largest probability."""

    right_n: np.ndarray[tuple[int], np.dtype[np.bool_]]
    """Whether the class of the largest logit is the image's."""


def _fitted(run: Run, kind: type[ProbeConfig], units: Sequence[Unit], task: Task, train: Labelled) -> list[Probe]:
    """Fit probes together; of a run that was stopped while it kept them, return those that it fitted.

    Fitted again without those that are kept, the sums of the others could be rounded in another way.
    """
    members, path = [unit.given["probe"] for unit in units], run.folder(units[-1]) / FITTED
    probes = [config.build(task) for config in members]
    form = files.form(_states(units, probes))

    def check(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        # With those that are kept by now.
        files.check({name: tensor for name, tensor in tensors.items() if name in form}, form)

    stored = sealed.read(path, check)
    if stored is None:
        probes = kind.fit_many(
            members, task, train.x_nd, train.y_n, lambda done, total: run.progress(done, total, "steps")
        )
        if not isinstance(probes, list) or [isinstance(probe, Probe) for probe in probes] != [True] * len(members):
            raise UserError(f"{whose(kind)}: fit() must return a Probe, fit_many() a list of them{got(probes)}")
        sealed.write(path, _states(units, probes))
        return probes
    for unit, probe in zip(units, probes, strict=True):
        probe.load_state_dict({name: stored[0][f"{unit.address}.{name}"] for name in probe.state_dict()})
    return probes


def _states(units: Sequence[Unit], probes: Sequence[Probe]) -> dict[str, Tensor]:
    return {
        f"{unit.address}.{name}": value
        for unit, probe in zip(units, probes, strict=True)
        for name, value in probe.state_dict().items()
    }


def open_probe(config: ProbeConfig, folder: Path, task: Task, device: str = "cpu") -> Probe:
    """Return a fitted probe from its unit's folder, in eval mode and frozen.

    Raises:
        UserError: the file cannot be read, or does not hold such a probe.

    """
    path = folder / FILE
    probe = config.build(task)
    try:
        tensors, _ = files.read(path)
        files.check(tensors, files.form(probe.state_dict()))
    except ValueError as error:
        raise UserError(f"{path}: is not the probe it should be; delete {folder} to make it again ({error})") from error
    probe.load_state_dict(tensors)
    return probe.to(device).eval().requires_grad_(False)


def depth(acts: Unit) -> int:
    """Return how many blocks the backbone of a recording's unit has."""
    n_blocks: int = acts.given["backbone"].describe().n_blocks
    return n_blocks


def _labelled(recording: Acts, split: str, name: str, token: Token, task: Task, device: str) -> Labelled:
    """Return what a probe reads of the labelled images of a split, and their classes.

    Raises:
        UserError: there are none; `name` says of what.

    """
    examples = recording.of_split(split)
    if not len(examples):
        purpose = {"train": "fitted", "valid": "chosen", "test": "reported"}[split]
        raise UserError(f"{name}: no image is in the {split} split, on which probes are {purpose}")
    examples = examples[recording.labels[examples] >= 0]
    if not len(examples):
        raise UserError(f"{name}: the images of the {split} split have no labels; a probe needs them")
    x_nd, done = torch.empty(len(examples), task.d_model, device=device), 0
    backbone = task.backbone() if task.backbone and token == "embedding" else None
    with torch.no_grad():
        for some, acts_etd in recording.read(inputs.held(token), examples):
            x_nd[done : done + len(some)] = inputs.taken(acts_etd.to(device), token, 0, backbone)
            done += len(some)
    return Labelled(examples, x_nd, torch.from_numpy(recording.labels[examples]).to(device))


@torch.no_grad()
def _check_logits(probe: Probe, x_nd: Tensor, n_classes: int) -> None:
    """Raise unless the probe reads tokens as logits, one a class."""
    logits, wanted = probe(x_nd), [len(x_nd), n_classes]
    shape = list(logits.shape) if isinstance(logits, Tensor) else logits
    if shape != wanted:
        raise UserError(f"{whose(type(probe))}: forward() must give logits [n, class], here {wanted}{got(shape)}")


@torch.no_grad()
def measure(probe: Probe, data: Labelled, name: str) -> Measured:
    """Return what the probe says of a split, and how often and how surely it is right.

    Raises:
        UserError: logits are NaN or infinite; `name` says of what.

    """
    loss, predicted, margins, sure = 0.0, [], [], []
    for start in range(0, len(data.y_n), BATCH):
        some = slice(start, start + BATCH)
        logits_nc = probe(data.x_nd[some]).cpu()
        if n_bad := int((~logits_nc.isfinite()).any(dim=1).sum()):
            first = data.examples[start + int((~logits_nc.isfinite()).any(dim=1).float().argmax())]
            raise UserError(
                f"{name}: the probe's logits are NaN or infinite for {n_bad} of {len(logits_nc)} images, first for "
                f"image {first}; lower its learning rate, or record tokens that are finite"
            )
        wide_nc = logits_nc.double()
        loss += float(cross_entropy(wide_nc, data.y_n[some].cpu(), reduction="sum"))
        top = logits_nc.topk(2, dim=1)
        predicted.append(top.indices[:, 0])
        margins.append(top.values[:, 0] - top.values[:, 1])
        sure.append(wide_nc.softmax(dim=1).amax(dim=1))
    predicted_n = torch.cat(predicted)
    right_n = (predicted_n == data.y_n.cpu()).numpy()
    n = len(predicted_n)
    accuracy, (margin_n, sure_n) = int(right_n.sum()) / n, (torch.cat(parts).numpy() for parts in (margins, sure))
    return Measured(accuracy, loss / n, predicted_n.numpy(), margin_n, sure_n, right_n)


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """One: probe."""
    return [ProbeStage]
