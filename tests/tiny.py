"""A backbone and a dataset so small that a whole pipeline runs in a second, and a desk to run one stage on."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from saefw.entry import KINDS, Member
from saefw.plugin import (
    Backbone,
    BackboneConfig,
    BackboneInfo,
    Dataset,
    DatasetConfig,
    Entry,
    Example,
    Place,
    Run,
    Split,
    StageConfig,
    Unit,
    hookimpl,
    mend_torchvision,
)
from saefw.run import Watcher
from saefw.store import Store


class TinyVit(BackboneConfig):
    """A real timm VisionTransformer with random weights: 16 px, patch 4, 3 blocks of width 16, [CLS]."""

    use: Literal["tiny-vit"] = "tiny-vit"

    seed: int = 0
    """Of the random weights."""

    def describe(self) -> BackboneInfo:
        return BackboneInfo(d_model=16, n_blocks=3, grid=(4, 4), prefix=("cls",))

    def build(self, device: str) -> "TinyBackbone":
        mend_torchvision()
        from timm.models import VisionTransformer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = VisionTransformer(
                img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, mlp_ratio=2, num_classes=0
            )
            with torch.no_grad():
                # Fresh timm weights are so small that blocks hardly change their input; these do.
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.copy_(torch.randn_like(parameter) * 0.3)
        return TinyBackbone(self.describe(), model).to(device).eval().requires_grad_(False)


class TinyBackbone(Backbone):
    """The model of TinyVit."""

    def __init__(self, info: BackboneInfo, model: nn.Module) -> None:
        super().__init__()
        self.info, self.model = info, model

    @property
    def blocks(self) -> Sequence[nn.Module]:
        blocks: Any = self.model.blocks
        return list(blocks)

    def prepare(self, image: Image.Image) -> Tensor:
        pixels = np.asarray(self.view(image), dtype=np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous() - 0.5

    def view(self, image: Image.Image) -> Image.Image:
        return image.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)

    def embed(self, images: Tensor) -> Tensor:
        model: Any = self.model
        tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return tokens


class TinySet(DatasetConfig):
    """Small images of three classes: a red, a green or a blue square on noise; a tenth is valid, a fifth test."""

    use: Literal["tiny-set"] = "tiny-set"

    n: int = 60
    """How many images."""

    seed: int = 0
    """Of the noise and of the squares' places."""

    broken: list[int] = Field(default_factory=list)
    """Images that cannot be read."""

    def build(self, base: Path) -> Dataset:
        return TinyImages(self.n, self.seed, frozenset(self.broken))


class TinyImages:
    """The images of TinySet."""

    classes = ("red", "green", "blue")

    def __init__(self, n: int, seed: int, broken: frozenset[int]) -> None:
        self.n, self.seed, self.broken = n, seed, broken

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.n:
            raise IndexError(index)
        splits: tuple[Split, ...] = ("train",) * 7 + ("valid",) + ("test",) * 2
        return Example(f"tiny-{index:03d}", index % 3, splits[index // 3 % 10], partial(self.image, index))

    def image(self, index: int) -> Image.Image:
        if index in self.broken:
            raise OSError("the file is cut short")
        rng = np.random.default_rng([self.seed, index])
        pixels = rng.integers(0, 80, (16, 16, 3), dtype=np.uint8)
        y, x = rng.integers(0, 9, 2)
        pixels[y : y + 8, x : x + 8, index % 3] += 160
        return Image.fromarray(pixels)


class TinyFolder(DatasetConfig):
    """The PNG files of a folder, as many and split as in TinySet."""

    use: Literal["tiny-folder"] = "tiny-folder"

    root: Place
    """Where they lie."""

    def build(self, base: Path) -> Dataset:
        root = self.root.open(base)
        return FolderImages(root, sorted(path.name for path in os.scandir(root)))


class FolderImages(TinyImages):
    """The images of TinyFolder."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        super().__init__(len(names), 0, frozenset())
        self.root, self.names = root, names

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        return example._replace(key=self.names[index], load=partial(Image.open, self.root / self.names[index]))


@hookimpl
def saefw_backbones() -> list[type[BackboneConfig]]:
    """One: tiny-vit."""
    return [TinyVit]


@hookimpl
def saefw_datasets() -> list[type[DatasetConfig]]:
    """Two: tiny-set, tiny-folder."""
    return [TinySet, TinyFolder]


def desk(
    path: Path,
    families: Mapping[str, Mapping[str, Entry | Sequence[Member]]] | None = None,
    metrics: Mapping[str, type[Any]] | None = None,
    watcher: Watcher | None = None,
) -> Run:
    """Set a desk without registry.yaml: store in `path`/runs, on the CPU, entered at stage `test`.

    `families` holds entries (or ready members) by kind and name: {"datasets": {"tiny": TinySet()}}. Backbone `tiny`
    and dataset `tiny` are always there.
    """
    given: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    given["backbones"]["tiny"], given["datasets"]["tiny"] = TinyVit(), TinySet()
    for kind, entries in (families or {}).items():
        given[kind] |= entries
    members = {
        kind: {
            name: [Member(name, entry)] if isinstance(entry, Entry) else list(entry) for name, entry in entries.items()
        }
        for kind, entries in given.items()
    }
    run = Run(Store(path / "runs"), path, members, metrics or {}, device="cpu", watcher=watcher, mend=True)
    run.enter("test")
    return run


def made(run: Run, name: str, stage: StageConfig) -> list[Unit]:
    """Plan a stage, make what is missing, and return what it lists."""
    run.enter(name)
    units = list(stage.units(run))
    run.listed(name, units)
    missing = [unit for unit in units if not run.store.has(unit)]
    if missing:
        stage.make(missing, run)
    return units
