"""Measures whether probes still read what SAEs reconstruct.

Shapes: n images, b of a batch, m MEASURES, k KINDS, t tokens, d d_model, c classes.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from saefw import controls, samples, sealed
from saefw.acts import Acts
from saefw.controls import Ints
from saefw.live import acts_of
from saefw.outcome import resampled
from saefw.plugin import (
    BackboneConfig,
    Knob,
    Names,
    Pace,
    Pick,
    Run,
    StageConfig,
    Unit,
    UserError,
    hookimpl,
)
from saefw.shards import check_tokens
from saefw.stages.readers import opened, picked, reaching
from saefw.steering import Steering
from saefw.trained import open_sae

Floats = NDArray[np.float64]

MEASURES = ("accuracy", "cross_entropy")

KINDS = ("clean", "reconstructed", "ablated")
"""The tokens as they are; what the SAE makes of them; their mean over the train split."""


class Faithfulness(StageConfig):
    """Replaces tokens by an SAE's reconstruction, runs the rest of the backbone and reads the probe.

    One unit for each SAE and, on each dataset with probes on its backbone, the probe that is picked, wherever the
    tokens that the SAE is of reach the probe. All tokens of that kind are replaced, and compared with the tokens as
    they are and with all of them at their mean over the train split: recovered = (reconstructed - ablated) / (clean -
    ablated), of the accuracy and of the cross-entropy.
    """

    use: Literal["faithfulness"] = "faithfulness"

    saes: Annotated[str, Names("stages")]
    """The stage that trained the SAEs."""

    probes: Annotated[str, Names("stages")]
    """The stage that fitted the probes."""

    probe: Pick = Pick()
    """Which of them, on each recording; without lowest or highest, of those of highest valid_accuracy the one of lowest
    valid_loss."""

    acts: Annotated[str, Names("stages")]
    """The stage that recorded the layers of the SAEs on the images of the probes."""

    split: Literal["valid", "test"] = "test"
    """The images to measure on."""

    n_examples: int | None = Field(None, gt=0)
    """How many of them, balanced by class; null: all that are labelled."""

    seed: int = Field(0, ge=0)
    """Of the images."""

    batch_size: Annotated[int, Knob] = Field(64, gt=0)
    """Images in one pass."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit for each SAE and picked probe.

        Raises:
            NotYet: the probes are not made yet.
            UserError: no SAE's tokens reach a probe, or they are not recorded on its images.

        """
        saes = run.made_by(self.saes, "train")
        pairs = reaching("faithfulness", saes, run.made_by(self.probes, "probe"))
        if not pairs:
            raise UserError(f"faithfulness: '{self.probes}' has no probe on the backbone of an SAE of '{self.saes}'")
        content = {key: value for key, value in self.content().items() if key not in ("use", "probe")}
        for read in dict.fromkeys(probe.needs[0] for _, probe in pairs):
            probe = picked(run, self.probes, self.probe, read)
            for sae, _ in reaching("faithfulness", saes, [probe]):
                label = f"{sae.label}, read by {probe.label}"
                yield Unit("faithfulness", content, needs=(sae, probe, self._recording(run, sae, read)), label=label)

    def _recording(self, run: Run, sae: Unit, read: Unit) -> Unit:
        """Return the recording of an SAE's layer on the images of a probe's."""
        layer = sae.needs[0].content["layer"]
        wanted = {**{key: read.content[key] for key in ("backbone", "dataset")}, "layer": layer}
        for unit in run.made_by(self.acts, "record"):
            if all(unit.content[key] == value for key, value in wanted.items()):
                check_tokens("faithfulness: acts", unit, "all")
                return unit
        raise UserError(f"faithfulness: acts: '{self.acts}' has no layer {layer} of the images of {read.label}")

    def duration(self, units: Sequence[Unit], run: Run, pace: Pace) -> float:
        """Return the seconds of the blocks between SAE and probe: once an SAE, and twice to compare with."""
        total = 0.0
        for (probe, recording, _), group in _groups(units).items():
            n = min(samples.sizes(recording, run)[self.split], self.n_examples or 1 << 62)
            n_blocks = probe.needs[0].content["layer"] - recording.content["layer"]
            total += (2 + len(group)) * n * n_blocks * samples.block(pace, samples.shape(recording), run.device)
            total += len(group) * samples.reading(pace, recording, run, n)
        return total

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Make each unit; images done by an interrupted run are not done again.

        Raises:
            UserError: there are no labelled images to measure on, or no train images for the mean.

        """
        for (probe, recording, place), group in _groups(units).items():
            acts = acts_of(recording, run)
            backbone = cast(BackboneConfig, recording.given["backbone"]).fresh(run.device)
            reader, examples = opened(probe, run), self._examples(recording.label, acts)
            known: dict[int, Tensor] = {}
            for unit in group:
                sae = unit.needs[0]
                steering = Steering(
                    backbone,
                    open_sae(sae.given["sae"], run.folder(sae), run.device),
                    reader,
                    acts.layer,
                    probe.needs[0].content["layer"],
                    place,
                    keep_error=False,
                    token=probe.content["token"],
                )
                self._measure(unit, run, steering, acts, examples, known)

    def _examples(self, name: str, acts: Acts) -> Ints:
        """Return the images to measure on."""
        examples = acts.of_split(self.split)
        examples = examples[acts.labels[examples] >= 0]
        if not len(examples):
            raise UserError(f"{name}: no labelled image is in the {self.split} split, on which SAEs are measured")
        if self.n_examples is not None:
            examples = examples[controls.balanced(acts.labels[examples], self.n_examples, self.seed)]
        return examples

    def _measure(
        self, unit: Unit, run: Run, steering: Steering, acts: Acts, examples: Ints, known: dict[int, Tensor]
    ) -> None:
        """Make a unit; `known` has what is the same for all SAEs of a group, clean and ablated [b, m, 2], by batch."""
        parts = []
        for start in range(0, len(examples), self.batch_size):
            some = examples[start : start + self.batch_size]
            path = run.folder(unit) / f"part-{start:08d}-{start + len(some):08d}.safetensors"
            form = {"found": (torch.float64, (len(some), len(MEASURES), len(KINDS)))}
            if (stored := sealed.read(path, form)) is not None:
                found_bmk = stored[0]["found"]
            else:
                found_bmk = _found(steering, acts, some, known.get(start), run.device)
                sealed.write(path, {"found": found_bmk})
            known[start] = found_bmk[..., [0, 2]]
            parts.append(found_bmk)
            run.progress(start + len(some), len(examples), "images")
        _write(unit, run, steering.place, self.split, torch.cat(parts).numpy())
        run.keep(unit, without=[path.name for path in run.folder(unit).glob("part-*")])


def _groups(units: Sequence[Unit]) -> dict[tuple[Unit, Unit, str], list[Unit]]:
    """Return the units by probe, recording and replaced tokens."""
    groups: dict[tuple[Unit, Unit, str], list[Unit]] = {}
    for unit in units:
        sae, probe, recording = unit.needs
        groups.setdefault((probe, recording, str(sae.content["tokens"])), []).append(unit)
    return groups


def _found(steering: Steering, acts: Acts, examples: Ints, known: Tensor | None, device: str) -> Tensor:
    """Return what is measured of some images, float64 [b, m, k]; `known` is that of clean and ablated ones."""
    ((_, tokens_btd),) = acts.read("all", examples, len(examples))
    tokens_btd, y_b = tokens_btd.to(device), torch.from_numpy(acts.labels[examples])
    reconstructed_bm = _measured(steering.reading(tokens_btd).logits_bc, y_b)
    if known is not None:
        return torch.stack([known[..., 0], reconstructed_bm, known[..., 1]], dim=-1)
    ablated_btd = tokens_btd.clone()
    ablated_btd[:, steering.edited] = acts.stats(steering.place).mean.to(tokens_btd)
    with torch.no_grad():
        clean_bm, ablated_bm = (_measured(steering.logits(x), y_b) for x in (tokens_btd, ablated_btd))
    return torch.stack([clean_bm, reconstructed_bm, ablated_bm], dim=-1)


def _measured(logits_bc: Tensor, y_b: Tensor) -> Tensor:
    """Return whether each image is taken for its class, and its cross-entropy in nats, float64 [b, m]."""
    wide_bc = logits_bc.cpu().double()
    right_b = (wide_bc.argmax(dim=1) == y_b).double()
    return torch.stack([right_b, cross_entropy(wide_bc, y_b, reduction="none")], dim=1)


def recovered(values_k: Floats) -> Floats:
    """Return (reconstructed - ablated) / (clean - ablated) of the last axis; NaN where clean and ablated are equal."""
    clean, reconstructed, ablated = np.moveaxis(values_k, -1, 0)
    whole = clean - ablated
    found: Floats = np.divide(reconstructed - ablated, whole, out=np.full(whole.shape, np.nan), where=whole != 0)
    return found


def _write(unit: Unit, run: Run, place: str, split: str, found_nmk: Floats) -> None:
    n, m, k = found_nmk.shape
    mean_mk = found_nmk.mean(axis=0)
    share_m = recovered(mean_mk)
    drawn = recovered(resampled(found_nmk.reshape(n, m * k), 0).reshape(-1, m, k))
    rows: list[dict[str, Any]] = []
    for i, measure in enumerate(MEASURES):
        told = dict(zip(KINDS, mean_mk[i].tolist(), strict=True))
        there = drawn[~np.isnan(drawn[:, i]), i]
        low, high = np.percentile(there, [2.5, 97.5]).tolist() if len(there) else (np.nan, np.nan)
        rows.append({"measure": measure, **told, "recovered": float(share_m[i]), "low": low, "high": high})
        run.log(unit, 0, **{f"{measure}_{kind}": value for kind, value in told.items()})
        run.log(unit, 0, **{f"recovered_{measure}": float(share_m[i])})
    run.log(unit, 0, n_images=n)
    sae, probe, recording = (need.address for need in unit.needs)
    whose = {"sae": sae, "probe": probe, "acts": recording, "place": place, "split": split, "n": n}
    run.put(unit, "faithfulness", **whose, **{name: [row[name] for row in rows] for name in rows[0]})


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """One: faithfulness."""
    return [Faithfulness]
