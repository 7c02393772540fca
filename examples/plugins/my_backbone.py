"""A backbone: any module whose blocks map tokens to tokens."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from saefw.plugin import Backbone, BackboneConfig, BackboneInfo, hookimpl
from torch import Tensor, nn


class MyBackbone(BackboneConfig):
    """A vision transformer of PyTorch's own layers, with random weights."""

    use: Literal["my-backbone"] = "my-backbone"

    seed: int = 0
    """Of the weights."""

    def describe(self) -> BackboneInfo:
        """Say its shapes: 8 x 8 patches of 4 x 4 pixels, no token before them."""
        return BackboneInfo(d_model=64, n_blocks=3, grid=(8, 8), prefix=())

    def build(self, device: str) -> Backbone:
        """Make it, or load your weights here."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made = MyBackboneModel(self.describe())
        return made.to(device).eval().requires_grad_(False)


class MyBackboneModel(Backbone):
    """Patches, places, blocks."""

    def __init__(self, info: BackboneInfo) -> None:
        """Start with random weights."""
        super().__init__()
        self.info, width = info, info.d_model
        self.patches = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.places = nn.Parameter(torch.randn(info.n_tokens, width))
        layer = nn.TransformerEncoderLayer(width, 4, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, info.n_blocks).layers

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in order."""
        return list(self.layers)

    def view(self, image: Image.Image) -> Image.Image:
        """Return the crop that the model sees."""
        return ImageOps.fit(image.convert("RGB"), (32, 32))

    def prepare(self, image: Image.Image) -> Tensor:
        """Return the crop as the model takes it, from -1 to 1."""
        pixels = np.asarray(self.view(image), dtype=np.float32)
        return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)

    def embed(self, images: Tensor) -> Tensor:
        """Return what enters the first block."""
        tokens: Tensor = self.patches(images).flatten(2).mT + self.places
        return tokens


@hookimpl
def saefw_backbones() -> list[type[BackboneConfig]]:
    """One: my-backbone."""
    return [MyBackbone]
