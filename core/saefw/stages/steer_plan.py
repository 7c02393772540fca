"""Chooses what the steer stage edits: images, targets, features, controls.

All on train, but for the images to measure on.

Shapes: e images, r roles, f features of an edit, m classes that an image speaks for, d d_model, s d_sae, c classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saefw import controls, sealed
from saefw.acts import Acts
from saefw.controls import Ints
from saefw.facts import Facts, facts
from saefw.plugin import Run, Unit, UserError
from saefw.steering import Steering
from saefw.tensors import Form

GRADIENT = "effect.safetensors"

SPEAKS = 32
"""An image speaks for so many classes: with more of them each is averaged over fewer images, or a run of 1,000 classes
would go back through the blocks 1,000 times an image."""

RANKED = 16
"""So many features of each class are listed for each way of choosing, if an edit does not need more."""

Floats = NDArray[np.float64]


class Plan(NamedTuple):
    """Which images are edited, towards which classes, by which features, and how."""

    mode: str
    raw: bool
    """Amounts are in the units of codes."""

    amounts: tuple[float, ...]
    examples: Ints
    target_er: Ints
    p99_s: Tensor
    """float32 [s], in the units of codes."""

    ranked: Mapping[str, Ints]
    """By way, the features of each class, the best first, [c, RANKED or more]."""

    score: Mapping[str, Floats]
    """By way, what they are ranked by, [s, c]."""

    effect_sc: Floats
    """What is predicted of adding 1 p99 everywhere, in logits."""

    chosen: Mapping[str, Ints]
    """By way, the features of an edit, [c, f]."""

    drawn: Mapping[str, controls.Drawn]
    """By way, the controls."""

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways of choosing features, in the order of the arrays."""
        return tuple(self.chosen)


def planned(unit: Unit, run: Run, steering: Steering, acts: Acts, batch_size: int) -> Plan:
    """Make the plan of a unit, as its content asks for.

    Raises:
        UserError: there are no labelled images to choose on or to measure on, or too few features.

    """
    asked: Mapping[str, Any] = unit.content
    labelled = _labelled(unit.needs[4].label, acts)
    train, test, seed = labelled["train"], labelled["test"], asked["seed"]
    with run.db() as db:
        told = facts(db, unit.needs[2].address, unit.needs[3].address, steering.sae.d_sae, len(acts.classes))
    usable_s = _usable(unit, told)
    some = train[controls.balanced(acts.labels[train], asked["n_effect"], seed)]
    gradient_cd = _gradient(run.folder(unit), steering, acts, some, batch_size, run)
    effect_sc = steering.effects(gradient_cd, torch.from_numpy(told.p99_s)).numpy()
    if asked["n_examples"] is not None:
        test = test[controls.balanced(acts.labels[test], asked["n_examples"], seed)]
    own = acts.labels[test]
    all_scores = {"effect": effect_sc, "mass": told.share_sc * told.rate_sc, "ap": told.ap_sc, "single": effect_sc}
    score = {way: all_scores[way] for way in asked["ways"]}
    n_ranked = min(max(RANKED, asked["n_features"]), int(usable_s.sum()))
    ranked = {way: controls.strongest(score_sc, usable_s, n_ranked) for way, score_sc in score.items()}
    chosen = {way: best[:, : 1 if way == "single" else asked["n_features"]] for way, best in ranked.items()}
    return Plan(
        mode=asked["mode"],
        raw=asked["raw"],
        amounts=tuple(asked["amounts"]),
        examples=test,
        target_er=np.stack([own, controls.others(own, np.unique(acts.labels[train]), seed)], axis=1),
        p99_s=torch.from_numpy(told.p99_s).float().to(run.device),
        ranked=ranked,
        score=score,
        effect_sc=effect_sc,
        chosen=chosen,
        drawn={
            way: controls.Drawn(chosen_cf, told.frequency_s, usable_s, steering.sae.d_model, seed)
            for way, chosen_cf in chosen.items()
        },
    )


def _labelled(name: str, acts: Acts) -> dict[str, Ints]:
    """Return the labelled images to choose on and to measure on."""
    labelled = {split: acts.of_split(split)[acts.labels[acts.of_split(split)] >= 0] for split in ("train", "test")}
    for split, examples in labelled.items():
        if not len(examples):
            purpose = "class features are chosen" if split == "train" else "steering is measured"
            raise UserError(f"{name}: no labelled image is in the {split} split, on which {purpose}")
    return labelled


def _usable(unit: Unit, told: Facts) -> NDArray[np.bool_]:
    """Return which features may be edited, bool [s]."""
    most, n = unit.content["max_frequency"], unit.content["n_features"]
    usable_s: NDArray[np.bool_] = (told.frequency_s > 0) & (told.frequency_s < most) & (told.p99_s > 0)
    if usable_s.sum() < 2 * n:
        counted = "images" if unit.needs[0].content["tokens"] == "cls" else "patches"
        raise UserError(
            f"steer: {int(usable_s.sum())} features of {unit.needs[0].label} fire, on less than {most:g} of the "
            f"{counted}; an edit of {n} and its control need {2 * n}"
        )
    return usable_s


def gradient_form(n_classes: int, d_model: int) -> Form:
    """Return what is in the file GRADIENT of a unit's folder."""
    return {"gradient": (torch.float64, (n_classes, d_model))}


def spoken_for(images: Sequence[int], n_images: int, n_classes: int) -> Tensor:
    """Return the classes that some of `n_images` images speak for, int64 [b, m]; each class has its images.

    With up to SPEAKS classes every image speaks for all of them.
    """
    m = min(n_classes, max(SPEAKS, -(-n_classes // n_images)))
    return (torch.tensor(images)[:, None] * m + torch.arange(m)) % n_classes


def _gradient(folder: Path, steering: Steering, acts: Acts, examples: Ints, batch_size: int, run: Run) -> Tensor:
    """Return the mean gradient of each class's logit over train images, float64 [c, d]; it stays in the folder."""
    path, c, n = folder / GRADIENT, len(acts.classes), len(examples)
    if (stored := sealed.read(path, gradient_form(c, acts.d_model))) is not None:
        return stored[0]["gradient"]
    total_cd, count_c, done = torch.zeros(c, acts.d_model, dtype=torch.float64), torch.zeros(c, dtype=torch.float64), 0
    for some, tokens_btd in acts.read("all", examples, batch_size):
        classes_bm = spoken_for(range(done, done + len(some)), n, c)
        found_bmd = steering.gradients(tokens_btd.to(run.device), classes_bm.to(run.device))
        total_cd.index_add_(0, classes_bm.flatten(), found_bmd.flatten(0, 1))
        count_c += classes_bm.flatten().bincount(minlength=c)
        done += len(some)
        run.progress(done, n, "train images")
    gradient_cd = total_cd / count_c[:, None]
    sealed.write(path, {"gradient": gradient_cd})
    return gradient_cd
