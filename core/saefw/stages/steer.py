"""Edits features of test images and measures what the probe says.

Everything is chosen on train: the SAE and the probe by their valid metrics, a class's features by their predicted
effect or by their mass. Everything is measured on test. Beside each edit by effect stand two controls of its norm.

Shapes: e images, t tokens, p edited tokens, f features of an edit, d d_model, s d_sae, c classes, l logits kept;
r roles, k kinds (ROLES, KINDS), a amounts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from saefw import controls, samples, sealed
from saefw.acts import Acts
from saefw.blocks import resolve
from saefw.care import write_atomically
from saefw.controls import Ints
from saefw.facts import Name, facts, names
from saefw.live import acts_of
from saefw.originals import again
from saefw.outcome import KINDS, ROLES, Readout, first, summary
from saefw.plugin import DatasetConfig, Knob, Names, Pace, Pick, Run, StageConfig, Unit, UserError, hookimpl
from saefw.shards import check_tokens
from saefw.stages.probe import depth, open_probe, task_of
from saefw.steering import Steering, along, check_reach, like_norm
from saefw.tensors import Form
from saefw.trained import open_sae

ALL_LOGITS = 20
"""With so many classes or fewer every logit is stored; with more, the TOP before and after, the own and the target."""

TOP = 5
GRADIENT = "effect.safetensors"


class SaePick(Pick):
    """Chooses an SAE: of one layer, if one is named, then by its metrics."""

    layer: int | None = None
    """The block whose output it was trained on, from the end if negative; null: any."""


class Steer(StageConfig):
    """Edits features of test images on their tokens, runs the rest of the backbone and reads the probe.

    One unit for the SAE that is picked and, on each dataset with probes, the probe that is picked. Each test image is
    edited with the features of its own class and with those of another. Beside the features chosen by predicted
    effect, with the same target and the same norm, stand features of like frequency, and random directions.

    Setting to 0 and multiplying change only what fires. Where none of the features of like frequency fires on an image,
    others are drawn that do; where there are none, that control is left out, and `n_controls_left_out` counts it.
    """

    use: Literal["steer"] = "steer"
    revision: ClassVar[int] = 3

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

    allow_off_distribution: bool = False
    """Allow an SAE that was trained on other tokens than those that are edited."""

    mode: Literal["set", "add", "scale"] = "set"
    """What is done to the code of a feature on every edited token: set it, add to it, or multiply it."""

    amounts: list[float] = Field([1.0], min_length=1)
    """How much: in units of each feature's p99; with mode scale a factor."""

    n_features: int = Field(3, gt=0)
    """Features in an edit."""

    max_frequency: float = Field(0.5, gt=0)
    """Only features that fire on a smaller share of patches (of images, for an SAE of [CLS]) are edited."""

    n_examples: int | None = Field(None, gt=0)
    """Test images, balanced by class; null: all that are labelled."""

    n_effect: int = Field(512, gt=0)
    """Train images, balanced by class, over which the predicted effect is averaged."""

    seed: int = Field(0, ge=0)
    """Of the images, of the other classes and of the controls."""

    batch_size: Annotated[int, Knob] = Field(64, gt=0)
    """Images in one pass."""

    # What to make

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit for each dataset that has probes on the backbone of the picked SAE.

        Raises:
            NotYet: the SAEs or probes are not made yet.
            UserError: the SAE, the probe and the tokens do not fit together.

        """
        sae = self._sae(run)
        trained_on = sae.needs[0]
        if sae.content["tokens"] != self.place and not self.allow_off_distribution:
            raise UserError(
                f"steer: place: {sae.label} was trained on {sae.content['tokens']}, but the edit is on {self.place}; "
                f"choose another SAE, or say allow_off_distribution: true"
            )
        recordings = dict.fromkeys(unit.needs[0] for unit in run.made_by(self.probes))
        ours = [unit for unit in recordings if unit.content["backbone"] == trained_on.content["backbone"]]
        if not ours:
            raise UserError(f"steer: '{self.probes}' has no probe on the backbone of {sae.label}")
        for recording in ours:
            check_reach(trained_on.content["layer"], recording.content["layer"], self.place)
            yield self._unit(run, sae, self._probe(run, recording))

    def _sae(self, run: Run) -> Unit:
        pick, layer = self.sae, self.sae.layer
        if not (pick.lowest or pick.highest):
            pick = pick.model_copy(update={"lowest": "nmse"})
        units = run.made_by(self.saes)
        if layer is None:
            return run.best(self.saes, pick)
        where = {unit: unit.needs[0].content["layer"] for unit in units}
        fits = [unit for unit in units if where[unit] == resolve(layer, depth(unit.needs[0]))]
        if not fits:
            layers = ", ".join(map(str, sorted(set(where.values()))))
            raise UserError(f"steer: sae: '{self.saes}' has no SAE of layer {layer} (there are: {layers})")
        return run.best(self.saes, pick, lambda unit: unit in fits)

    def _probe(self, run: Run, recording: Unit) -> Unit:
        """Pick a probe on a recording; few valid images make many of a sweep equally accurate, so the loss decides."""

        def among(unit: Unit) -> bool:
            return unit.needs[0] == recording

        if self.probe.lowest or self.probe.highest:
            return run.best(self.probes, self.probe, among)
        most = run.best(self.probes, self.probe.model_copy(update={"highest": "valid_accuracy"}), among)
        with run.db() as db:
            told = db.execute("SELECT value FROM final WHERE unit = ? AND name = 'valid_accuracy'", [most.address])
            ((accuracy,),) = told.fetchall()
        above = {**self.probe.above, "valid_accuracy": accuracy}
        return run.best(self.probes, self.probe.model_copy(update={"lowest": "valid_loss", "above": above}), among)

    def _unit(self, run: Run, sae: Unit, probe: Unit) -> Unit:
        """Find the tables that the edit needs: of the SAE, and of the SAE on the probe's dataset."""
        dataset, named = probe.needs[0].content["dataset"], self.classes or self.visuals
        found = [unit for unit in run.made_by(named) if unit.needs[0] == sae]
        classes = [unit for unit in found if unit.needs[1].content["dataset"] == dataset]
        if not classes:
            raise UserError(f"steer: '{named}' has no tables of {sae.label} over the images of {probe.needs[0].label}")
        check_tokens("steer: classes" if self.classes else "steer: visuals", classes[0].needs[1], "all")
        own = [unit for unit in run.made_by(self.visuals) if unit.needs == (sae, sae.needs[0])]
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
            n_passes = n_edited * (1 + len(ROLES) * len(KINDS) * len(self.amounts))
            # Back through a block takes about as long as forth; weights have no gradient.
            n_effect = min(counts["train"], self.n_effect)
            n_passes += n_effect * (1 + n_classes)
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
        read = acts_of(probe.needs[0], run)
        steering = Steering(
            recording.given["backbone"].build(run.device),
            open_sae(sae.given["sae"], run.folder(sae), run.device),
            open_probe(probe.given["probe"], run.folder(probe), task_of(read), run.device),
            acts.layer,
            read.layer,
            self.place,
        )
        plan = self._plan(unit, run, steering, acts)
        parts = []
        for start in range(0, len(plan.examples), self.batch_size):
            stop = min(start + self.batch_size, len(plan.examples))
            path = run.folder(unit) / f"part-{start:08d}-{stop:08d}.safetensors"
            form = self._form(stop - start, len(acts.classes))
            if (stored := sealed.read(path, form)) is not None:
                part = stored[0]
            else:
                part = self._edit(steering, plan, acts, slice(start, stop), run.device)
                sealed.write(path, part)
            parts.append(part)
            run.progress(stop, len(plan.examples), "images")
        made = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
        self._write(unit, run, plan, acts, made)
        run.keep(unit, without=[path.name for path in run.folder(unit).glob("part-*")])

    def _plan(self, unit: Unit, run: Run, steering: Steering, acts: Acts) -> "Plan":
        """Choose images, targets, features and controls; on train, but for the images to measure on."""
        name, n_classes = unit.needs[4].label, len(acts.classes)
        labelled = {split: acts.of_split(split)[acts.labels[acts.of_split(split)] >= 0] for split in ("train", "test")}
        for split, examples in labelled.items():
            if not len(examples):
                purpose = "class features are chosen" if split == "train" else "steering is measured"
                raise UserError(f"{name}: no labelled image is in the {split} split, on which {purpose}")
        train, test = labelled["train"], labelled["test"]
        with run.db() as db:
            tables = facts(db, unit.needs[2].address, unit.needs[3].address, steering.sae.d_sae, n_classes)
        usable_s = (tables.frequency_s > 0) & (tables.frequency_s < self.max_frequency) & (tables.p99_s > 0)
        on_cls = unit.needs[0].content["tokens"] == "cls"
        if usable_s.sum() < 2 * self.n_features:
            raise UserError(
                f"steer: {int(usable_s.sum())} features of {unit.needs[0].label} fire, on less than "
                f"{self.max_frequency:g} of the {'images' if on_cls else 'patches'}; an edit of {self.n_features} and "
                f"its control need {2 * self.n_features}"
            )
        p99_s = torch.from_numpy(tables.p99_s)
        some = train[controls.balanced(acts.labels[train], self.n_effect, self.seed)]
        effect_sc = steering.effects(self._gradient(run.folder(unit), steering, acts, some, run), p99_s).numpy()
        if self.n_examples is not None:
            test = test[controls.balanced(acts.labels[test], self.n_examples, self.seed)]
        own = acts.labels[test]
        target_er = np.stack([own, controls.others(own, np.unique(acts.labels[train]), self.seed)], axis=1)
        by_effect_cf = controls.strongest(effect_sc, usable_s, self.n_features)
        return Plan(
            examples=test,
            target_er=target_er,
            p99_s=p99_s.float().to(run.device),
            by_effect_cf=by_effect_cf,
            by_mass_cf=controls.strongest(tables.share_sc * tables.rate_sc, usable_s, self.n_features),
            drawn=controls.Drawn(by_effect_cf, tables.frequency_s, usable_s, steering.sae.d_model, self.seed),
        )

    def _gradient(self, folder: Path, steering: Steering, acts: Acts, examples: Ints, run: Run) -> Tensor:
        """Return the mean gradient of each class's logit over train images, float64 [c, d]; it stays in the folder."""
        path = folder / GRADIENT
        form = {"gradient": (torch.float64, (len(acts.classes), acts.d_model))}
        if (stored := sealed.read(path, form)) is not None:
            return stored[0]["gradient"]
        total_cd, done = torch.zeros(len(acts.classes), acts.d_model, dtype=torch.float64), 0
        for some, tokens_etd in acts.read("all", examples, self.batch_size):
            total_cd += steering.gradients(tokens_etd.to(run.device)).cpu().double()
            done += len(some)
            run.progress(done, len(examples), "train images")
        gradient_cd = total_cd / done
        sealed.write(path, {"gradient": gradient_cd})
        return gradient_cd

    def _edit(self, steering: Steering, plan: "Plan", acts: Acts, part: slice, device: str) -> dict[str, Tensor]:
        """Edit some images in every role, by every kind, by every amount."""
        examples, target_er = plan.examples[part], plan.target_er[part]
        ((_, tokens_etd),) = acts.read("all", examples, len(examples))
        before = steering.reading(tokens_etd.to(device))
        before_ec = before.logits_bc.cpu()
        drawn = [[plan.drawn(int(e), int(c)) for c in targets] for e, targets in zip(examples, target_er, strict=True)]
        like_erf = torch.tensor(np.array([[like for like, _ in row] for row in drawn]))
        if self.mode == "scale" or (self.mode == "set" and 0 in self.amounts):
            fires_es = steering.fires(before).cpu().numpy()
            for e, r in np.ndindex(target_er.shape):
                if not fires_es[e, like_erf[e, r]].any():
                    like_f = plan.drawn.firing(int(examples[e]), int(target_er[e, r]), fires_es[e])
                    like_erf[e, r] = torch.from_numpy(like_f)
        direction_erd = torch.tensor(np.array([[d for _, d in row] for row in drawn]), dtype=torch.float32)
        after, norms = [], []
        for r in range(len(ROLES)):
            features_ef = {
                "effect": torch.from_numpy(plan.by_effect_cf[target_er[:, r]]).to(device),
                "mass": torch.from_numpy(plan.by_mass_cf[target_er[:, r]]).to(device),
                "like features": like_erf[:, r].to(device),
            }
            for amount in self.amounts:
                deltas = {}
                for kind, chosen_ef in features_ef.items():
                    size_ef = torch.ones_like(plan.p99_s[chosen_ef]) if self.mode == "scale" else plan.p99_s[chosen_ef]
                    deltas[kind] = steering.delta(before, chosen_ef, amount * size_ef, self.mode)
                deltas["like features"] = like_norm(deltas["like features"], deltas["effect"])
                # A negative amount goes the other way, so that the control has a dose of its own.
                direction_ed = direction_erd[:, r].to(device) * (-1 if amount < 0 else 1)
                deltas["random directions"] = along(direction_ed, deltas["effect"])
                norms.append(torch.stack([deltas[kind].flatten(1).norm(dim=1) for kind in KINDS], dim=1).cpu())
                after.append(torch.stack([steering.after(before, deltas[kind]) for kind in KINDS], dim=1).cpu())
        grid = len(ROLES), len(self.amounts)
        after_erkac = torch.stack(after, dim=1).view(len(examples), *grid, len(KINDS), -1).transpose(2, 3)
        label_erkal = _kept(before_ec, after_erkac, torch.from_numpy(target_er))
        return {
            "norm": torch.stack(norms, dim=1).view(len(examples), *grid, -1).transpose(2, 3).contiguous(),
            "label": label_erkal,
            "before": _picked(before_ec[:, None, None, None].expand_as(after_erkac), label_erkal),
            "after": _picked(after_erkac, label_erkal),
            "like": like_erf,
        }

    def _form(self, n: int, n_classes: int) -> Form:
        """Return what `_edit` gives of n images."""
        grid = n, len(ROLES), len(KINDS), len(self.amounts)
        some = *grid, n_classes if n_classes <= ALL_LOGITS else 2 * TOP + 2
        logits = dict.fromkeys(("before", "after"), (torch.float32, some))
        chosen = n, len(ROLES), self.n_features
        return {"norm": (torch.float32, grid), "label": (torch.int64, some), "like": (torch.int64, chosen), **logits}

    # Writing it down

    def _write(self, unit: Unit, run: Run, plan: "Plan", acts: Acts, made: Mapping[str, NDArray[Any]]) -> None:
        """Write the tables, the metrics and the first example."""
        sae, probe, _, _, recording = unit.needs
        e, shape = len(plan.examples), made["norm"].shape  # [e, r, k, a]
        edit_erka = np.arange(made["norm"].size).reshape(shape)
        index_e, index_r, index_k, index_a = (index.ravel() for index in np.indices(shape))
        amounts = np.array(self.amounts)
        # A control without a norm where the edit has one is none.
        like = KINDS.index("like features")
        there_erka = np.ones(shape, dtype=bool)
        there_erka[:, :, like] = (made["norm"][:, :, like] > 0) | (made["norm"][:, :, KINDS.index("effect")] == 0)
        there = there_erka.ravel()
        run.put(
            unit,
            "edit",
            sae=sae.address,
            probe=probe.address,
            acts=recording.address,
            edit=edit_erka.ravel()[there],
            example=plan.examples[index_e][there],
            place=self.place,
            role=np.array(ROLES)[index_r][there],
            chosen_by=np.array(KINDS)[index_k][there],
            mode=self.mode,
            dose=amounts[index_a][there],
            target=plan.target_er[index_e, index_r][there],
            norm=made["norm"].ravel()[there],
        )
        feature_erkf = np.stack(
            [plan.by_effect_cf[plan.target_er], plan.by_mass_cf[plan.target_er], made["like"]], axis=2
        )
        whole = e, len(ROLES), feature_erkf.shape[2], len(amounts), self.n_features
        with_features = there_erka[:, :, : whole[2]]
        run.put(
            unit,
            "edit_feature",
            edit=np.broadcast_to(edit_erka[:, :, : whole[2], :, None], whole)[with_features].ravel(),
            feature=np.broadcast_to(feature_erkf[:, :, :, None], whole)[with_features].ravel(),
            amount=np.broadcast_to(amounts[:, None], whole)[with_features].ravel(),
        )
        kept = (made["label"] >= 0) & there_erka[..., None]
        run.put(
            unit,
            "edit_logit",
            edit=np.broadcast_to(edit_erka[..., None], kept.shape)[kept],
            label=made["label"][kept],
            before=made["before"][kept],
            after=made["after"][kept],
        )
        read = Readout(made["label"], made["before"], made["after"], plan.target_er)
        read.shift_erka[~there_erka] = np.nan
        counts = {"n_images": e, "n_edits": int(there.sum()), "n_controls_left_out": int((~there).sum())}
        run.log(unit, 0, **summary(read, int(np.argmax(amounts))), **counts)
        classes = unit.needs[3]
        with run.db() as db:
            named = names(db, classes.address, classes.content["top"], acts.grid)
        nowhere = Name(0.0, 0.0)
        rank_c = np.array([min(max(named.get(int(f), nowhere)) for f in chosen) for chosen in plan.by_effect_cf])
        if (place := first(read, rank_c, amounts)) is not None:
            told = self._told(read, plan, acts, named, place)
            write_atomically(run.folder(unit) / "first.json", json.dumps(told, indent=1).encode())
            write_atomically(run.folder(unit) / "first.png", _picture(recording, run, told["example"], told["key"]))

    def _told(
        self, read: Readout, plan: "Plan", acts: Acts, named: Mapping[int, Name], place: tuple[int, int, int, int]
    ) -> dict[str, Any]:
        """Return what first.json says of an edit; before and after are probabilities (with many classes, shares)."""
        (e, r, _, a), example = place, int(plan.examples[place[0]])
        features = plan.by_effect_cf[plan.target_er[e, r]].tolist()
        before, after = ({acts.classes[i]: round(p, 6) for i, p in told.items()} for told in read.probabilities(place))
        return {
            "edit": int(np.ravel_multi_index(place, read.shift_erka.shape)),
            "example": example,
            "key": acts.keys[example],
            "from": acts.classes[plan.target_er[e, 0]],
            "to": acts.classes[plan.target_er[e, r]],
            "features": features,
            "purity": [named[feature].purity for feature in features],
            "place": [named[feature].place for feature in features],
            "amount": self.amounts[a],
            "before": before,
            "after": after,
        }


class Plan(NamedTuple):
    """Which images are edited, towards which classes, by which features."""

    examples: Ints
    target_er: Ints
    p99_s: Tensor
    """float32 [s], in the units of codes."""

    by_effect_cf: Ints
    by_mass_cf: Ints
    drawn: controls.Drawn


# Details


def _picture(recording: Unit, run: Run, example: int, key: str) -> bytes:
    """Return what the model sees of an image, as PNG."""
    from io import BytesIO

    image = again(run.dataset(recording.given["dataset"]), example, key)
    file = BytesIO()
    recording.given["backbone"].build("cpu").view(image).save(file, "PNG")
    return file.getvalue()


def _kept(before_ec: Tensor, after_erkac: Tensor, target_er: Tensor) -> Tensor:
    """Return the labels whose logits are stored, int64 [e, r, k, a, l] ascending; -1: none."""
    c = after_erkac.shape[-1]
    if c <= ALL_LOGITS:
        return torch.arange(c).expand_as(after_erkac).contiguous()
    shape = after_erkac.shape[:-1]
    own_e1, wanted = target_er[:, :1], target_er[:, :, None, None, None]
    label = torch.cat(
        [
            before_ec.topk(TOP).indices[:, None, None, None].expand(*shape, TOP),
            after_erkac.topk(TOP).indices,
            wanted.expand(*shape, 1),
            own_e1[:, None, None, None].expand(*shape, 1),
        ],
        dim=-1,
    ).sort(dim=-1)[0]
    label[..., 1:][label[..., 1:] == label[..., :-1]] = -1
    return label


def _picked(logits: Tensor, label: Tensor) -> Tensor:
    return logits.gather(-1, label.clamp_min(0)).contiguous()


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """One: steer."""
    return [Steer]
