"""Edits features of test images and measures what the probe says.

Everything is chosen on train: the SAE and the probe by their valid metrics, a class's features by their predicted
effect, their mass or their average precision. Everything is measured on test. Beside each edit stand two controls of
its norm.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, field_validator, model_validator

from saefw import samples, sealed
from saefw.blocks import resolve
from saefw.live import acts_of
from saefw.outcome import KINDS, ROLES
from saefw.plugin import DatasetConfig, Knob, Names, Pace, Pick, Run, StageConfig, Unit, UserError, hookimpl
from saefw.shards import check_tokens
from saefw.stages.probe import depth
from saefw.stages.readers import opened, picked, reaching
from saefw.stages.steer_edits import edited, form
from saefw.stages.steer_plan import planned, spoken_for
from saefw.stages.steer_tables import write
from saefw.stages.visuals import looked_at
from saefw.steering import FACTORS, Steering
from saefw.trained import open_sae


class SaePick(Pick):
    """Chooses an SAE: of one layer, if one is named, then by its metrics."""

    layer: int | None = None
    """The block whose output it was trained on, from the end if negative; null: any."""


class Steer(StageConfig):
    """Edits features of test images on their tokens, runs the rest of the backbone and reads the probe.

    One unit for the SAE that is picked and, on each dataset with probes, the probe that is picked. Each test image is
    edited with the features of its own class and with those of another. Beside each edit, with the same target and the
    same norm, stand features of like frequency, and random directions.

    Setting to 0, multiplying and ablating change only what fires. Where none of the features of like frequency fires on
    an image, others are drawn that do; where there are none, that control is left out, and `n_controls_left_out` counts
    it.
    """

    use: Literal["steer"] = "steer"
    revision: ClassVar[int] = 5

    saes: Annotated[str, Names("stages")]
    """The stage that trained the SAEs."""

    sae: SaePick = SaePick()
    """Which of them; without lowest or highest, the one of lowest nmse."""

    probes: Annotated[str, Names("stages")]
    """The stage that fitted the probes."""

    probe: Pick = Pick()
    """Which of them, on each dataset; without lowest or highest, of those of highest valid_accuracy the one of lowest
    valid_loss."""

    visuals: Annotated[str, Names("stages")]
    """The stage that says p99 and frequency of the features, best over the SAE's own training set."""

    classes: Annotated[str | None, Names("stages")] = None
    """The stage that says which features fire for which class of the probes' dataset; null: the same."""

    place: Literal["patches", "cls"] = "patches"
    """The tokens that are edited: all patches, or [CLS]."""

    patches: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1)
    """With place patches, those that are edited, row by row from 0; null: all."""

    allow_off_distribution: bool = False
    """Allow an SAE that was trained on other tokens than those that are edited."""

    keep_error: bool = True
    """Add edits to the tokens as they are; false: to the SAE's reconstruction of them, and compare with that."""

    mode: Literal["set", "add", "scale", "ablate"] = "set"
    """What is done to the code of a feature on every edited token: set it, add to it, multiply it, or take a share of
    it away."""

    amounts: list[float] = Field([1.0], min_length=1)
    """How much: in units of each feature's p99, if not raw; with mode scale a factor, with mode ablate a share."""

    raw: bool = False
    """Amounts are in the units of codes, the same for each feature, in place of each feature's p99."""

    ways: list[Literal["effect", "mass", "ap", "single"]] = Field(["effect", "mass", "ap", "single"], min_length=1)
    """How the features of a class are chosen, on train images: those of largest predicted effect on its logit; of
    largest mass in it, times how often they fire there; of largest average precision as its detectors; or the one of
    largest predicted effect alone. The first example is one of the first of these."""

    n_features: int = Field(3, gt=0)
    """Features in an edit; in those of the way `single` there is one."""

    max_frequency: float = Field(0.5, gt=0)
    """Only features that fire on a smaller share of patches (of images, for an SAE of [CLS]) are edited."""

    n_examples: int | None = Field(None, gt=0)
    """Test images, balanced by class; null: all that are labelled."""

    n_effect: int = Field(512, gt=0)
    """Train images, balanced by class, over which the predicted effect is averaged; with more than 32 classes an image
    speaks for 32 of them."""

    seed: int = Field(0, ge=0)
    """Of the images, of the other classes and of the controls."""

    batch_size: Annotated[int, Knob] = Field(64, gt=0)
    """Images in one pass."""

    @field_validator("patches")
    @classmethod
    def _in_order(cls, patches: list[int] | None) -> list[int] | None:
        if patches and (twice := [patch for patch in patches if patches.count(patch) > 1]):
            raise ValueError(f"a patch is named once (got {twice[0]} twice)")
        return patches and sorted(patches)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.patches and self.place == "cls":
            raise ValueError("patches are edited with place: patches (got place: cls)")
        if self.raw and self.mode in FACTORS:
            raise ValueError(f"amounts have no unit with mode: {self.mode}; leave out raw")
        return self

    # What to make

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit for each dataset that has probes on the backbone of the picked SAE.

        Raises:
            NotYet: the SAEs or probes are not made yet.
            UserError: the SAE, the probe and the tokens do not fit together.

        """
        reaching("steer", self._candidates(run), run.made_by(self.probes, "probe"), self.place)
        sae = self._sae(run)
        trained_on = sae.needs[0]
        self._check_place(sae)
        recordings = dict.fromkeys(unit.needs[0] for unit in run.made_by(self.probes, "probe"))
        ours = [unit for unit in recordings if unit.content["backbone"] == trained_on.content["backbone"]]
        if not ours:
            raise UserError(f"steer: '{self.probes}' has no probe on the backbone of {sae.label}")
        for recording in ours:
            yield self.pair(run, sae, picked(run, self.probes, self.probe, recording))

    def pair(self, run: Run, sae: Unit, probe: Unit) -> Unit:
        """Return the unit that edits features of one SAE and reads one probe, whatever the picks say.

        Raises:
            NotYet: the tables of their features are not made yet.
            UserError: the SAE, the probe and the tokens do not fit together.

        """
        self._check_place(sae)
        if probe.needs[0].content["backbone"] != sae.needs[0].content["backbone"]:
            raise UserError(f"steer: {probe.label} is not on the backbone of {sae.label}")
        reaching("steer", [sae], [probe], self.place)
        return self._unit(run, sae, probe)

    def _check_place(self, sae: Unit) -> None:
        if sae.content["tokens"] != self.place and not self.allow_off_distribution:
            raise UserError(
                f"steer: place: {sae.label} was trained on {sae.content['tokens']}, but the edit is on {self.place}; "
                f"choose another SAE, or say allow_off_distribution: true"
            )
        rows, columns = sae.needs[0].given["backbone"].describe().grid
        if self.patches and self.patches[-1] >= rows * columns:
            raise UserError(
                f"steer: patches: there is no patch {self.patches[-1]} (there are: 0 to {rows * columns - 1})"
            )

    def _candidates(self, run: Run) -> list[Unit]:
        """Return the SAEs of the layer that is named, or all."""
        units, layer = run.made_by(self.saes, "train"), self.sae.layer
        if layer is None:
            return units
        where = {unit: unit.needs[0].content["layer"] for unit in units}
        fits = [unit for unit in units if where[unit] == resolve(layer, depth(unit.needs[0]))]
        if not fits:
            layers = ", ".join(map(str, sorted(set(where.values()))))
            raise UserError(f"steer: sae: '{self.saes}' has no SAE of layer {layer} (there are: {layers})")
        return fits

    def _sae(self, run: Run) -> Unit:
        pick, fits = self.sae, self._candidates(run)
        if not (pick.lowest or pick.highest):
            pick = pick.model_copy(update={"lowest": "nmse"})
        return run.best(self.saes, pick, lambda unit: unit in fits)

    def _unit(self, run: Run, sae: Unit, probe: Unit) -> Unit:
        """Find the tables that the edit needs: of the SAE, and of the SAE on the probe's dataset."""
        token, same = probe.content["token"], probe.needs[0].content["layer"] == sae.needs[0].content["layer"]
        if self.patches and same and isinstance(token, int) and token not in self.patches:
            raise UserError(f"steer: patches: the probe reads patch {token} of the edited block; edit it too")
        dataset, named = probe.needs[0].content["dataset"], self.classes or self.visuals
        tokens = sae.content["tokens"]

        def tables(stage: str) -> list[Unit]:
            made = run.made_by(stage, "visuals")
            return [unit for unit in made if unit.needs[0] == sae and looked_at(unit) == tokens]

        found = tables(named)
        classes = [unit for unit in found if unit.needs[1].content["dataset"] == dataset]
        if not classes:
            raise UserError(
                f"steer: '{named}' has no tables of {sae.label} over the {tokens} of the images of "
                f"{probe.needs[0].label}"
            )
        check_tokens("steer: classes" if self.classes else "steer: visuals", classes[0].needs[1], "all")
        own = [unit for unit in tables(self.visuals) if unit.needs[1] == sae.needs[0]]
        for stage, unit in ((named, classes[0]), (self.visuals, (own or classes)[0])):
            if (split := unit.content["split"]) != "train":
                raise UserError(f"steer: '{stage}' looked at the {split} split, but features are chosen on train alone")
        # What picks the pair is told by what it picked; what is allowed decides no result.
        picks = ("use", "sae", "probe", "allow_off_distribution")
        content = {key: value for key, value in self.content().items() if key not in picks}
        return Unit(
            "steer",
            content,
            needs=(sae, probe, (own or classes)[0], classes[0], classes[0].needs[1]),
            label=f"{sae.label}, read by {probe.label}",
        )

    def duration(self, units: Sequence[Unit], run: Run, pace: Pace) -> float:
        """Return the seconds of the blocks between SAE and probe: for every edit, and back from every class's logit."""
        total = 0.0
        for unit in units:
            sae, probe, *_, recording = unit.needs
            counts = samples.sizes(recording, run)
            n_classes = len(run.dataset(cast(DatasetConfig, recording.given["dataset"])).classes)
            n_edited = min(counts["test"], self.n_examples or counts["test"])
            n_passes = n_edited * (1 + len(ROLES) * len(self.ways) * len(KINDS) * len(self.amounts))
            # Back through a block takes about as long as forth; weights have no gradient.
            n_effect = min(counts["train"], self.n_effect)
            n_passes += n_effect * (1 + spoken_for([0], max(1, n_effect), n_classes).shape[1])
            n_blocks = probe.needs[0].content["layer"] - sae.needs[0].content["layer"]
            total += n_passes * n_blocks * samples.block(pace, samples.shape(recording), run.device)
            total += samples.reading(pace, recording, run, n_edited + n_effect)
        return total

    # Making it

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Make each unit; images done by an interrupted run are not done again.

        Raises:
            UserError: there are no labelled images to choose on or to measure on, or too few features.

        """
        for unit in units:
            self._steer(unit, run)

    def _steer(self, unit: Unit, run: Run) -> None:
        sae, probe, _, _, recording = unit.needs
        acts = acts_of(recording, run)
        steering = Steering(
            recording.given["backbone"].fresh(run.device),
            open_sae(sae.given["sae"], run.folder(sae), run.device),
            opened(probe, run),
            acts.layer,
            probe.needs[0].content["layer"],
            self.place,
            self.keep_error,
            probe.content["token"],
            self.patches,
        )
        plan = planned(unit, run, steering, acts, self.batch_size)
        parts = []
        for start in range(0, len(plan.examples), self.batch_size):
            stop = min(start + self.batch_size, len(plan.examples))
            path = run.folder(unit) / f"part-{start:08d}-{stop:08d}.safetensors"
            if (stored := sealed.read(path, form(stop - start, len(acts.classes), plan))) is not None:
                part = stored[0]
            else:
                part = edited(steering, plan, acts, slice(start, stop), run.device)
                sealed.write(path, part)
            parts.append(part)
            run.progress(stop, len(plan.examples), "images")
        made = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
        write(unit, run, plan, acts, made)
        run.keep(unit, without=[path.name for path in run.folder(unit).glob("part-*")])


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """One: steer."""
    return [Steer]
