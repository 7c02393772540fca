"""Reads what the steering page shows: an SAE and a probe with their models, tables and pictures.

Whatever grows with the number of features or images is read when it is first looked at.

Shapes: t tokens, p patches, s d_sae, c classes, d d_model; images one at a time.
"""

from base64 import b64encode
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from saefw import controls, inputs, notes, pictures, tensors
from saefw.blocks import tokens_after
from saefw.errors import escaped
from saefw.experiment.choices import Choice
from saefw.experiment.tables import Features, First, Guide, first_of, guides_of, title_of
from saefw.live import acts_of
from saefw.originals import again
from saefw.plugin import Backbone, UserError
from saefw.stages.readers import opened as opened_probe
from saefw.stages.steer_plan import GRADIENT, gradient_form
from saefw.stages.visuals import MAPS, PICTURES
from saefw.steering import FACTORS, Edit, Reading, Steering
from saefw.trained import open_sae
from saefw.unit import canonical

if TYPE_CHECKING:
    from PIL.Image import Image

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Place = Literal["patches", "cls"]

THUMBNAILS, SIDE = 5, 96
"""Example pictures of a feature, and the pixels of their longer side."""

SPEAK = 64
"""Train images over which a predicted effect is averaged that the steer stage did not store."""

OPEN = 4
"""Experiments that stay open in a process."""


class Change(NamedTuple):
    """What is done to a feature."""

    feature: int
    mode: str
    """`set`, `add`, `scale` or `ablate`."""

    amount: float
    """In units of its p99; a factor with mode `scale`, a share with `ablate`."""


class After(NamedTuple):
    """What comes of an edit."""

    probability_c: Floats
    norm: float
    """The Frobenius norm of what was added to the tokens, in their own units."""


class Seen(NamedTuple):
    """An image as the models see it, before any edit."""

    readings: dict[str, Reading]
    """Of this image alone, by the place of edits."""

    codes_ts: NDArray[np.float32]
    """Codes of all tokens."""

    n_prefix: int

    @property
    def patch_ps(self) -> NDArray[np.float32]:
        """Codes of the patches."""
        return self.codes_ts[self.n_prefix :]

    def edited(self, place: str) -> NDArray[np.float32]:
        """Return the codes of the tokens that edits of a place change: the patches, or [CLS] alone."""
        return self.codes_ts[:1] if place == "cls" else self.patch_ps

    def probability_c(self, place: str) -> Floats:
        """Return what the probe says."""
        return probabilities(self.readings[place].logits_bc[0])


_OPENED: dict[Choice, "Experiment"] = {}
_TURN = RLock()


def opened(choice: Choice) -> "Experiment":
    """Open a choice, once a process, whoever asks and however many at once."""
    with _TURN:
        if choice not in _OPENED:
            made = Experiment(choice)
            for oldest in list(_OPENED)[: max(0, len(_OPENED) - OPEN + 1)]:
                del _OPENED[oldest]
            _OPENED[choice] = made
        return _OPENED[choice]


def is_open(choice: Choice) -> bool:
    """Whether a choice is open already, so that opening it takes no time."""
    return choice in _OPENED


@dataclass(frozen=True)
class Model:
    """A backbone on a device."""

    content: str
    """The canonical JSON of its settings."""

    device: str
    entry: Any = field(compare=False)


@lru_cache(maxsize=2)
def built(model: Model) -> Backbone:
    """Load a backbone, once for all experiments on it."""
    made: Backbone = model.entry.fresh(model.device)
    return made


class Experiment:
    """A choice, its models loaded."""

    def __init__(self, choice: Choice) -> None:
        """Load the models.

        Raises:
            UserError: something that it is made of is damaged, or is not there.

        """
        unit, run = choice.unit, choice.run
        sae, probe, tables, classes, recording = unit.needs
        self.steered = choice.steered
        # What is small; a recording may be a terabyte.
        run.check(sae, probe, *([unit] if self.steered else []))
        self.choice, self.unit, self._run, self._looks = choice, unit, run, run.folder(classes)
        self.acts = acts_of(recording, run)
        self.trained_on = str(sae.content["tokens"])
        self.counted = "images" if self.trained_on == "cls" else "patches"
        self.place: Place = unit.content["place"]
        self.mode = str(unit.content["mode"])
        self.amounts = [1.0] if unit.content["raw"] else [float(amount) for amount in unit.content["amounts"]]
        # Escaped as for any other eye: HTML would show an override of the direction of writing by obeying it.
        self.classes = list(map(escaped, self.acts.classes))
        self.labels = self.acts.labels
        parts = (
            built(Model(canonical(recording.given["backbone"].content()), run.device, recording.given["backbone"])),
            open_sae(sae.given["sae"], run.folder(sae), run.device),
            opened_probe(probe, run),
        )
        self.sae = parts[1]
        self.steerings: dict[str, Steering] = {}
        """By place, those in which an edit reaches what the probe reads."""
        layers = self.acts.layer, int(probe.needs[0].content["layer"])
        token: inputs.Token = probe.content["token"]
        places: list[Place] = ["patches", "cls"] if parts[0].info.has_cls else ["patches"]
        for place in places:
            with nullcontext() if place == self.place else suppress(UserError):
                self.steerings[place] = Steering(*parts, *layers, place, bool(unit.content["keep_error"]), token)
        self.direct = [place for place in self.steerings if layers[1] > layers[0] and inputs.held(token) == place]
        """The places of edits that the probe itself reads, past the blocks between."""
        self._images = run.dataset(recording.given["dataset"])
        self.about = Features(run, tables, classes, self.sae.d_sae, self.labels)
        self.title, self.subtitle = title_of(unit, run, self.acts.layer)
        folder = run.store.folder(unit)
        # What was edited in other units, or on some patches alone, is not what is edited here.
        alike = self.steered and not unit.content["raw"] and unit.content["patches"] is None
        self.first: First | None = first_of(folder, self.acts.classes) if alike else None
        self.guides: list[Guide] = guides_of(unit, run, self.first) if self.first else []
        self.top = int(classes.content["top"])
        self.max_frequency = float(unit.content["max_frequency"])
        self.seen = lru_cache(maxsize=8)(self._seen)
        self.view = lru_cache(maxsize=32)(self._view)
        self.thumbnails = lru_cache(maxsize=512)(self._thumbnails)
        self._rankings: dict[tuple[int, str], Ints] = {}

    def check_place(self, place: str) -> None:
        """See that an edit somewhere reaches what the probe reads.

        Raises:
            UserError: it does not.

        """
        if place not in self.steerings:
            one, other = ("[CLS]", "patches") if place == "cls" else ("patches", "[CLS]")
            raise UserError(f"the probe reads nothing that an edit of {one} reaches; edit {other}")

    # Notes

    def note(self, feature: int, name: str, text: str = "") -> notes.Note:
        """Call a feature by a name, and say more about it; both empty: take that back.

        Raises:
            UserError: there is no such feature, or something of the note is too long or does not print.
            OSError: the store cannot be written to.

        """
        if not 0 <= feature < self.sae.d_sae:
            raise UserError(f"feature: there is no {feature} (there are: 0 to {self.sae.d_sae - 1})")
        return notes.write(self._run.store.root, self.choice.sae.address, feature, name, text)

    def called(self) -> dict[int, str]:
        """Return what people call features, those that have a name, as any eye may see it."""
        said = notes.of(self._run.store.root, self.choice.sae.address)
        return {feature: escaped(note.name) for feature, note in said.items() if note.name}

    # Images

    @cached_property
    def beginning(self) -> tuple[int, int]:
        """The image and the other class to begin with: those of the stored example, if there is one."""
        if self.first:
            return self.first.example, self.first.target
        start = int(self.test[0]) if len(self.test) else 0
        return start, (int(self.labels[start]) + 1) % len(self.classes)

    @cached_property
    def test(self) -> Ints:
        """The labelled test images."""
        return self.of_split("test")

    def of_split(self, split: str) -> Ints:
        """Return the labelled images of a split, ascending."""
        examples = self.acts.of_split(split)
        return examples[self.labels[examples] >= 0]

    def of_class(self, label: int, split: str = "test") -> Ints:
        """Return the images of a class and a split."""
        examples = self.of_split(split)
        found: Ints = examples[self.labels[examples] == label]
        return found

    def key(self, example: int) -> str:
        """Return the key of an image as it is shown."""
        return escaped(self.acts.keys[example])

    def find(self, text: str) -> int:
        """Return an image by its number or its key, or by a part of its key that no other has.

        Raises:
            UserError: there is none, or there are several.

        """
        keys, asked = self.acts.keys, text.strip()
        if asked.isdecimal() and len(asked) < 10 and int(asked) < len(keys):
            return int(asked)
        if asked in keys:
            return keys.index(asked)
        found = [i for i, key in enumerate(keys) if asked and asked in key]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{len(found)} images have '{escaped(asked)}' in their key; say more of it")
        raise UserError(
            f"there is no image '{escaped(asked[:60])}' (there are 0 to {len(keys) - 1}, called like '{self.key(0)}')"
        )

    @cached_property
    def predicted(self) -> Ints:
        """What the probe takes each test image for, by example; -1 where it was not asked."""
        found = np.full(self.acts.n_examples, -1, dtype=np.int64)
        with self._run.store.db() as db:
            rows = db.execute(
                "SELECT example, predicted FROM prediction WHERE unit = ?", [self.unit.needs[1].address]
            ).fetchnumpy()
        found[rows["example"]] = rows["predicted"]
        return found

    # Features

    def strong(self, label: int, n: int, place: str | None = None) -> list[int]:
        """Return the features with the largest predicted effect on a class's logit, as the steer stage chose them."""
        place = place or self.place
        if (label, place) not in self._rankings:
            self._rankings[label, place] = self._ranked(label, place)
        return [int(feature) for feature in self._rankings[label, place][:n]]

    def knows(self, label: int, place: str) -> bool:
        """Whether the strong features of a class are known at once; otherwise blocks run over some train images."""
        return (label, place) in self._rankings or (self.steered and place == self.place)

    def detectors(self, label: int, n: int) -> list[int]:
        """Return the features that are the best detectors of a class, by average precision."""
        with self._run.store.db() as db:
            rows = db.execute(
                "SELECT feature FROM class_feature WHERE unit = ? AND label = ? ORDER BY ap DESC, feature LIMIT ?",
                [self.unit.needs[3].address, label, 4 * n],
            ).fetchall()
        return [feature for (feature,) in rows if feature in self.about][:n]

    def controls(self, example: int, label: int, n: int, place: str) -> list[int]:
        """Return features of like frequency beside the strong ones of a class, drawn as the steer stage does."""
        chosen = np.array([self.strong(label, n, place)])
        drawn = controls.Drawn(chosen, self.about.frequency_s, self._usable_s, self.sae.d_model, 0)
        return [int(feature) for feature in drawn(example, 0)[0]]

    def firing(self, seen: Seen, place: str | None = None, patches: Sequence[int] = ()) -> list[int]:
        """Return the features that fire in an image and tell it from others, the largest value in their p99 first.

        Args:
            seen: the image.
            place: where; by default where the stage edits.
            patches: on these alone, if any are named.

        """
        codes_ps = seen.edited(place or self.place)
        most_s = (codes_ps[list(patches)] if patches else codes_ps).max(axis=0)
        order = np.argsort(-most_s, kind="stable")
        return [int(s) for s in order[: int((most_s > 0).sum())] if self._usable_s[s]]

    @cached_property
    def _usable_s(self) -> NDArray[np.bool_]:
        frequency_s, p99_s = self.about.frequency_s, self.about.p99_s
        usable: NDArray[np.bool_] = (frequency_s > 0) & (frequency_s < self.max_frequency) & (p99_s > 0)
        return usable

    def _ranked(self, label: int, place: str) -> Ints:
        gradient_cd = torch.from_numpy(self._gradient_d(label, place)[None])
        effect_sc = self.steerings[place].effects(gradient_cd, torch.from_numpy(self.about.p99_s)).numpy()
        best: Ints = controls.strongest(effect_sc, self._usable_s, min(64, int(self._usable_s.sum())))[0]
        return best

    def _gradient_d(self, label: int, place: str) -> Floats:
        """Return the mean gradient of a class's logit, [d]: the steer stage's, or one over some train images."""
        if self.steered and place == self.place:
            found: Floats = self._stored_cd[label].numpy()
            return found
        train = self.of_split("train")
        some = train[controls.balanced(self.labels[train], SPEAK, 0)]
        total_d, wanted = torch.zeros(self.acts.d_model, dtype=torch.float64), torch.tensor([[label]])
        for examples, tokens_btd in self.acts.read("all", some, 16):
            classes_bm = wanted.expand(len(examples), 1).to(self._run.device)
            total_d += self.steerings[place].gradients(tokens_btd.to(self._run.device), classes_bm).sum(dim=(0, 1))
        mean: Floats = (total_d / max(1, len(some))).numpy()
        return mean

    @cached_property
    def _stored_cd(self) -> torch.Tensor:
        folder = self._run.store.folder(self.unit)
        form = gradient_form(len(self.classes), self.acts.d_model)
        try:
            found, _ = tensors.read(folder / GRADIENT)
            tensors.check(found, form)
        except ValueError as error:
            raise UserError(
                f"{folder / GRADIENT}: cannot be read ({error}); delete {folder} to make it again"
            ) from error
        return found["gradient"]

    # Edits

    def edit(
        self,
        seen: Seen,
        changes: Sequence[Change],
        place: str | None = None,
        patches: Sequence[int] | None = None,
        directly: bool = False,
        raw: bool = False,
    ) -> After:
        """Run an edit.

        Args:
            seen: the image.
            changes: what is done to which features.
            place: the tokens that are edited, `patches` or `cls`; by default where the stage edits.
            patches: which to edit; null: all.
            directly: past the blocks between, into the tokens that the probe reads.
            raw: amounts are in the units of codes.

        """
        place = place or self.place
        steering, reading = self.steerings[place], seen.readings[place]
        edits = self.edits(changes, place, patches, raw)
        if not edits:
            return After(seen.probability_c(place), 0.0)
        delta_bpd = steering.change(reading, edits)
        logits_bc = steering.directly(reading, delta_bpd) if directly else steering.after(reading, delta_bpd)
        return After(probabilities(logits_bc[0]), float(delta_bpd.norm()))

    def edits(self, changes: Sequence[Change], place: str, patches: Sequence[int] | None, raw: bool) -> list[Edit]:
        """Return changes as the engine takes them; the arguments are those of `edit`."""
        some = None if place == "cls" else patches
        return [
            Edit(s, mode, x if raw or mode in FACTORS else x * float(self.about.p99_s[s]), some)
            for s, mode, x in changes
        ]

    def read(self, image: "Image") -> tuple[Seen, "Image"]:
        """Return an image of anybody's as the models see it, and the crop that they see."""
        backbone = self.steerings[self.place].backbone
        prepared = backbone.prepare(image)[None].to(self._run.device)
        with torch.no_grad():
            tokens_btd = tokens_after(backbone, prepared, self.acts.layer)
        return self._of_tokens(tokens_btd), backbone.view(image).convert("RGB")

    def _seen(self, example: int) -> Seen:
        return self._of_tokens(self.tokens(example))

    def tokens(self, example: int) -> torch.Tensor:
        """Return what the SAE's block puts out for an image, float32 [1, t, d]."""
        ((_, tokens_1td),) = self.acts.read("all", np.array([example]))
        return tokens_1td.to(self._run.device)

    @torch.no_grad()
    def _of_tokens(self, tokens_1td: torch.Tensor) -> Seen:
        return Seen(
            {place: steering.reading(tokens_1td) for place, steering in self.steerings.items()},
            self.sae.dense(tokens_1td[0]).cpu().numpy(),
            self.acts.n_prefix,
        )

    # Pictures

    def _view(self, example: int) -> "Image":
        image = again(self._images, example, self.acts.keys[example])
        return self.steerings[self.place].backbone.view(image).convert("RGB")

    def _thumbnails(self, feature: int) -> list[tuple[str, int]]:
        """Return the feature's top images with its patches lit, as data URIs, and which they are."""
        examples = self.about[feature].top[:THUMBNAILS].tolist()
        views = pictures.read(self._looks / PICTURES, examples)
        maps_tp, grid = pictures.maps(self._looks / MAPS, feature), self.acts.grid
        lit = [
            (pictures.lit(views[e], pictures.on_grid(maps_tp[i], grid), SIDE), e)
            for i, e in enumerate(examples)
            if e in views
        ]
        return [("data:image/png;base64," + b64encode(pictures.png(x)).decode(), e) for x, e in lit]


def probabilities(logits_c: torch.Tensor) -> Floats:
    """Return the softmax of logits, in float64."""
    found: Floats = torch.softmax(logits_c.double().cpu(), dim=0).numpy()
    return found
