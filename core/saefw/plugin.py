"""All that a plugin author imports."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, final, get_args

import pluggy
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from saefw.entry import Entry, Knob, Late, Names, Place
from saefw.errors import NotYet, UserError, did_you_mean
from saefw.fetch import Source
from saefw.images import open_image
from saefw.imagesets import Dataset, Example, Files, ImageFiles, clean, folder, image_files, inside, read_lines
from saefw.metric import Metric, PerToken
from saefw.origin import whose
from saefw.pace import Pace, timed
from saefw.run import Pick, Run
from saefw.sae import Codes, Sae
from saefw.splits import Split, carve, stratified
from saefw.style import WIDTH
from saefw.unit import Unit
from saefw.vision import mend_torchvision

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = [
    "Backbone",
    "BackboneConfig",
    "BackboneInfo",
    "Codes",
    "Dataset",
    "DatasetConfig",
    "Entry",
    "Example",
    "FigureConfig",
    "Files",
    "ImageFiles",
    "KeptConfig",
    "Knob",
    "Late",
    "Metric",
    "Names",
    "NotYet",
    "Pace",
    "PenalisedConfig",
    "PerToken",
    "Pick",
    "Place",
    "Prefix",
    "Probe",
    "ProbeConfig",
    "Run",
    "SaeConfig",
    "Source",
    "Split",
    "StageConfig",
    "Task",
    "Unit",
    "UserError",
    "carve",
    "clean",
    "did_you_mean",
    "folder",
    "hookimpl",
    "image_files",
    "inside",
    "mend_torchvision",
    "open_image",
    "read_lines",
    "stratified",
    "timed",
]

hookimpl = pluggy.HookimplMarker("saefw")
"""Marks a function of a plugin module as its answer to the hook of the same name."""

# Backbones

Prefix = Literal["cls", "dist", "register"]
"""What a token before the patches is: [CLS], the distillation token of DeiT, or a register."""


class BackboneInfo(NamedTuple):
    """What can be said of a backbone without its weights."""

    d_model: int
    """Width of a token."""

    n_blocks: int
    """How many blocks it has; layer -1 is block n_blocks - 1."""

    grid: tuple[int, int]
    """Patches: rows, columns."""

    prefix: tuple[Prefix, ...]
    """The tokens before the patches, in order; [CLS], where there is one, comes first."""

    d_embed: int = 0
    """Width of what `Backbone.embedding` gives; 0: it gives none."""

    @property
    def n_prefix(self) -> int:
        """How many tokens come before the patches."""
        return len(self.prefix)

    @property
    def n_tokens(self) -> int:
        """How many tokens an image has."""
        return len(self.prefix) + self.grid[0] * self.grid[1]

    @property
    def has_cls(self) -> bool:
        """Whether the first token is [CLS]."""
        return self.prefix[:1] == ("cls",)


class Backbone(nn.Module):
    """A vision transformer whose blocks can be watched and edited, in eval mode, its weights frozen."""

    info: BackboneInfo

    logit_scale: float = 1.0
    """What cosines between `embedding` and `text` are multiplied by to become logits, as the model was trained."""

    logit_bias: float = 0.0
    """What is added to them (SigLIP)."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in order; each maps [batch, token, d_model] to the same shape."""
        raise NotImplementedError(f"{type(self).__name__} has no blocks")

    def prepare(self, image: "Image") -> Tensor:
        """Return the image as the weights expect it: float32 [3, height, width]."""
        raise NotImplementedError(f"{type(self).__name__} cannot prepare an image")

    def view(self, image: "Image") -> "Image":
        """Return the very crop that the model sees, RGB, for people; patches lie on it in row-major order."""
        raise NotImplementedError(f"{type(self).__name__} cannot show what it sees")

    def embed(self, images: Tensor) -> Tensor:
        """Return what enters block 0, [batch, token, d_model], of prepared images [batch, 3, height, width]."""
        raise NotImplementedError(f"{type(self).__name__} cannot embed images")

    def tail(self, tokens: Tensor, first: int, last: int | None = None) -> Tensor:
        """Run the blocks from number `first` to `last`, the final one by default, both included.

        Override it where a block takes more than the tokens. With `last` before `first` the tokens come back unchanged.
        """
        for block in self.blocks[first : None if last is None else last + 1]:
            tokens = block(tokens)
        return tokens

    def cls_after(self, tokens: Tensor, number: int) -> Tensor:
        """Return [CLS] as block `number` puts it out, [batch, d_model], of what enters that block.

        Override it where the block need not be run for the other tokens: their keys and values are enough.
        """
        return self.tail(tokens, number, number)[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        """Return the output of the last block, [batch, token, d_model]; no final norm."""
        return self.tail(self.embed(images), 0)

    def embedding(self, tokens: Tensor) -> Tensor:
        """Return the image embedding [batch, d_embed], not normalised, of the last block's output.

        That is what follows the blocks: final norm, pooling and, where the model has one, projection.

        Raises:
            UserError: the backbone gives none.

        """
        raise UserError(f"{type(self).__name__} has no image embedding")

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings [prompt, d_embed], not normalised, of texts by the model's own text tower.

        Raises:
            UserError: the model has no text tower.

        """
        raise UserError(f"{type(self).__name__} has no text tower")


class BackboneConfig(Entry):
    """A vision transformer that a plugin can load."""

    has_text: ClassVar[bool] = False
    """Whether its backbones have a text tower."""

    def describe(self) -> BackboneInfo:
        """Say its shapes without loading or downloading weights, so that planning is cheap."""
        raise NotImplementedError(f"{type(self).__name__} does not describe itself")

    @final
    def fresh(self, device: str) -> Backbone:
        """Return what `build` loads, once it is seen to be what `describe` says; what everybody but the plugin calls.

        Raises:
            UserError: it is not, or cannot be loaded.

        """
        info, made = self.describe(), _built(self, self.build(device), Backbone)
        faults, own = [], getattr(made, "info", None)
        if set(info.prefix) - set(get_args(Prefix)):
            faults.append(f"prefix is made of {', '.join(get_args(Prefix))} (got {info.prefix!r})")
        if own != info:
            faults.append(f"info of what build() returns must be what describe() says (got {own})")
        elif len(made.blocks) != info.n_blocks:
            faults.append(f"there are {len(made.blocks)} blocks, but describe() says n_blocks={info.n_blocks}")
        if faults:
            raise UserError("\n".join(f"{whose(type(self))}: {fault}" for fault in faults))
        return made

    def build(self, device: str) -> Backbone:
        """Load it on a device."""
        raise NotImplementedError(f"{type(self).__name__} has no build()")


# Datasets


class _Subset:
    """Some images of a dataset, in its order."""

    def __init__(self, whole: Dataset, indices: Sequence[int]) -> None:
        self.classes, self._whole, self._indices = whole.classes, whole, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._whole[self._indices[index]]


class DatasetConfig(Entry):
    """An image set that a plugin can open."""

    sources: ClassVar[tuple[Source, ...]] = ()
    """The files that `saefw get` downloads and unpacks into the folder that the setting `root` then names."""

    n_images: ClassVar[int] = 0
    """How many images it has when it is whole, for `saefw get` to count; 0: not known."""

    terms: ClassVar[str] = ""
    """Where it comes from and on what terms, in one sentence, for who downloads it."""

    limit: Annotated[int | None, Late] = Field(default=None, gt=0)
    """At most so many images, to try first: of every split and class its share, always the same ones; null: all."""

    @final
    def open(self, base: Path) -> Dataset:
        """Open it with its `limit`; what everybody but the plugin itself calls.

        The choice hangs on the keys alone, so that a larger limit holds the images of a smaller one.

        Raises:
            UserError: it is not there, cannot be opened, or is no dataset.

        """
        try:
            whole = self.build(base)
        except OSError as error:
            use = type(self).model_fields["use"].default
            raise UserError(f"dataset '{use}' cannot be opened ({error}); put it back and run again") from error
        for name in ("classes", "__len__", "__getitem__"):
            # Of the class first: what an instance computes may take long.
            if not hasattr(type(whole), name) and not hasattr(whole, name):
                raise UserError(f"{whose(type(self))}: what build() returns must have {name} (got {whole!r})")
        if self.limit is None or len(whole) <= self.limit:
            return whole
        keys, labels, splits = zip(*(whole[i][:3] for i in range(len(whole))), strict=True)
        # First among the splits, then among the classes of each: else of many classes the large split would take all.
        counts = Counter(splits[i] for i in stratified(keys, splits, self.limit))
        chosen: list[int] = []
        for split, n in counts.items():
            ours = [i for i, other in enumerate(splits) if other == split]
            chosen += [ours[i] for i in stratified([keys[i] for i in ours], [labels[i] for i in ours], n)]
        return _Subset(whole, sorted(chosen))

    def build(self, base: Path) -> Dataset:
        """Open all of it; `base` is the folder of registry.yaml, from which relative paths count.

        Raises:
            UserError: it is not there, or not as it should be; the text names what is missing.

        """
        raise NotImplementedError(f"{type(self).__name__} has no build()")


# SAE variants


class SaeConfig(Entry):
    """An SAE variant that a plugin can train."""

    expansion: int | None = Field(default=16, gt=0)
    """d_sae as a multiple of d_model; where d_sae is set, leave it out."""

    d_sae: int | None = Field(default=None, gt=0)
    """How many features there are; null: expansion times d_model."""

    init: Literal["tied", "kaiming", "data"] = "tied"
    """How the weights start: `tied`, decoder rows of norm 1 in random directions and W_enc their transpose; `kaiming`,
    W_enc and W_dec drawn apart, each uniform as He et al. 2015; `data`, as tied, but with rows near training tokens.
    """

    b_dec: Literal["mean", "zero", "median"] = "mean"
    """Where the decoder bias starts: at the `mean` of the training tokens, which is 0 since these are centred; at the
    `zero` of the activations as they were recorded; or at the geometric `median` of some of the tokens.
    """

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of Adam between warm-up and decay."""

    warmup: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises, from its first fraction up."""

    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls at the end: not at all, on a line, or as half a cosine."""

    decay: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps, the last ones, over which it falls to 0; with `schedule: constant` it does not."""

    clip: float | None = Field(default=1.0, gt=0)
    """Largest L2 norm of the whole gradient, to which a larger one is scaled down; null: as it comes."""

    unit_norm: bool = True
    """Keep each decoder row at L2 norm 1, and its gradient orthogonal to it."""

    aux: float = Field(default=1 / 32, ge=0)
    """Weight of AuxK, the loss that lets dead features learn what the others leave over; 0: none."""

    k_aux: int | None = Field(default=None, gt=0)
    """Dead features that AuxK may use on one token; null: the largest power of two up to d_model / 2."""

    aux_share: float = Field(default=1 / 4, gt=0, le=1)
    """On which share of a batch's tokens AuxK is reckoned."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the product with W_enc while training; sums, weights and all else are float32."""

    seed: int = 0
    """Of the initial weights."""

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        expansion, d_sae = (data.get(name, cls.model_fields[name].default) for name in ("expansion", "d_sae"))
        if d_sae is None and expansion is None:
            raise ValueError("set expansion or d_sae (both are null)")
        if d_sae is None:
            return data
        if data.get("expansion") is not None:
            raise ValueError(f"set expansion or d_sae, not both (got {expansion!r} and {d_sae!r})")
        return {**data, "expansion": None}

    def width(self, d_model: int) -> int:
        """Return d_sae, for a model of this width."""
        return self.d_sae or d_model * (self.expansion or 1)

    @final
    def fresh(self, d_model: int) -> Sae:
        """Return what `build` builds with the settings that all variants share; what everybody but the plugin calls.

        Raises:
            UserError: the settings do not fit a model of this width, or it is no SAE for one.

        """
        sae = _built(self, self.build(d_model), Sae)
        if sae.d_model != d_model:
            raise UserError(f"{whose(type(self))}: build({d_model}) returns an SAE whose d_model is {sae.d_model}")
        sae.aux, sae.k_aux = self.aux, self.k_aux or 1 << max(0, (d_model // 2).bit_length() - 1)
        sae.aux_share = self.aux_share
        sae.precision = getattr(torch, self.precision)
        return sae

    def build(self, d_model: int) -> Sae:
        """Return a fresh one with these settings; torch's generator is seeded by the caller.

        Where `init` and `b_dec` are not at their defaults, the trainer starts W_enc, W_dec and b_dec anew.

        Raises:
            UserError: the settings do not fit a model of this width.

        """
        raise NotImplementedError(f"{type(self).__name__} has no build()")


class KeptConfig(SaeConfig):
    """An SAE variant whose sparsity is a number: so many features are kept."""

    k: int = Field(default=32, gt=0)
    """Features that may fire on one token."""

    def fitting(self, d_model: int) -> int:
        """Return d_sae, for a model of this width.

        Raises:
            UserError: that is less than k.

        """
        if self.k > (d_sae := self.width(d_model)):
            raise UserError(f"{self.content()['use']}: k is {self.k}, but there are {d_sae} features")
        return d_sae


class PenalisedConfig(SaeConfig):
    """An SAE variant whose sparsity comes from a penalty: the term `penalty` of its loss."""

    sparsity_warmup: int = Field(default=0, ge=0)
    """Steps over which the weight of the penalty rises, from its first fraction up."""


# Probes


class Task(NamedTuple):
    """What a probe is to learn."""

    d_model: int
    """Width of an input."""

    classes: tuple[str, ...]
    """Names of the classes, by label."""

    backbone: Callable[[], Backbone] | None = None
    """Loads the backbone that the inputs come from, for a probe that asks it for more; None: there is none at hand."""


class Probe(nn.Module):
    """Reads classes off a token; all its state is in parameters and buffers."""

    def forward(self, x_nd: Tensor) -> Tensor:
        """Return the logits, float32 [n, class]."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")


class ProbeConfig(Entry):
    """A probe that a plugin can fit."""

    def check(self, task: Task, backbone: BackboneConfig, token: str | int) -> None:
        """See, before anything is made, that it can read the task off a backbone; by default it can.

        Args:
            task: what to learn, without a backbone at hand.
            backbone: where the inputs come from.
            token: what they are: `cls`, `mean`, `embedding` or the number of a patch.

        Raises:
            UserError: it cannot.

        """

    def build(self, task: Task) -> Probe:
        """Return an unfitted one, into which `load_state_dict` may put a stored state."""
        raise NotImplementedError(f"{type(self).__name__} has no build()")

    def fit(self, task: Task, x_nd: Tensor, y_n: Tensor) -> Probe:
        """Return one fitted to tokens x (float32) and labels y (int64)."""
        raise NotImplementedError(f"{type(self).__name__} cannot be fitted")

    @classmethod
    def fit_many(
        cls, members: Sequence["ProbeConfig"], task: Task, x_nd: Tensor, y_n: Tensor, done: Callable[[int, int], None]
    ) -> list[Probe]:
        """Fit every member of a sweep; override it to fit all at once. `done(steps, of)` reports progress."""
        probes = []
        for i, member in enumerate(members):
            probes.append(member.fit(task, x_nd, y_n))
            done(i + 1, len(members))
        return probes


# Stages and figures


class StageConfig(Entry):
    """A step of the pipeline: it lists units, and makes those that are missing."""

    def units(self, run: Run) -> Iterable[Unit]:
        """List what it makes, cheaply; every fault that can be known is raised here.

        Raises:
            NotYet: what it makes depends on results that are not there yet.
            UserError: the settings do not fit together.

        """
        raise NotImplementedError(f"{type(self).__name__} lists no units")

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Make the missing units, calling `run.keep` on each as soon as it is complete."""
        raise NotImplementedError(f"{type(self).__name__} makes nothing")

    def disk(self, unit: Unit, run: Run) -> int:
        """Say about how many bytes a unit will take, for `saefw run --dry`; cheaply, so 0 where it is not known."""
        return 0

    def work(self, unit: Unit, run: Run) -> str:
        """Say how much there is to do for a unit, for `saefw run --dry`: `1,717 images`; cheaply, or nothing."""
        return ""

    def duration(self, units: Sequence[Unit], run: Run, pace: Pace) -> float:
        """Say about how long missing units take, for `saefw run --dry`; nan where it is not known.

        Args:
            units: those to make, all that one call of `make` gets.
            run: as in `units`.
            pace: measures pieces of work on this machine, each once for all stages.

        """
        return math.nan


class FigureConfig(Entry):
    """A figure drawn from the store alone."""

    wants: ClassVar[tuple[str, ...]] = ()
    """The stages (their `use`) whose units it is drawn from; where one of them is missing it is skipped."""

    names_features: ClassVar[bool] = False
    """Whether it shows what people call features, so that it is drawn again when they say something else."""

    width: float = Field(default=WIDTH, ge=2, le=40)
    """Inches; 7.2 for both columns of a paper, 3.4 for one."""

    height: float | None = Field(default=None, ge=1, le=40)
    """Inches; null: as fits what is shown."""

    title: str | None = None
    """In place of the figure's own title; an empty text: none."""

    def draw(self, db: "DuckDBPyConnection", units: Mapping[str, Sequence[Path]]) -> "Figure":
        """Draw it; it is brought to its size and given its title afterwards, if they are set.

        Args:
            db: the index, read-only; tables as in schema.sql.
            units: by the `use` of the stage, the folders of the units to draw from; a folder is named by its address.

        """
        raise NotImplementedError(f"{type(self).__name__} draws nothing")


Made = TypeVar("Made")


def _built(entry: Entry, made: object, base: type[Made]) -> Made:
    """Return what a plugin built, which must be what its kind asks for."""
    if not isinstance(made, base):
        raise UserError(f"{whose(type(entry))}: build() must return a {base.__name__} (got {made!r})")
    return made


def settings(entry: Entry) -> dict[str, Any]:
    """Return the settings of an entry that tell it apart, without `use` and `revision`; for tables and titles."""
    return {key: value for key, value in entry.content().items() if key not in ("use", "revision")}
