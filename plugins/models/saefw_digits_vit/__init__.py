"""A small vision transformer that reads handwritten digits; its weights are part of the package."""

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from saefw.plugin import Backbone, BackboneConfig, BackboneInfo, UserError, hookimpl, mend_torchvision

if TYPE_CHECKING:
    from PIL.Image import Image


class DigitsVit(BackboneConfig):
    """A vision transformer of 0.3 M parameters, trained on the train split of the digits."""

    use: Literal["digits-vit"] = "digits-vit"

    def content(self) -> dict[str, Any]:
        """Return the settings and what tells the weights apart, so that new weights are a new backbone."""
        return {**super().content(), "weights": _about()["sha256"]}

    def describe(self) -> BackboneInfo:
        """Say its shapes, as `weights.json` holds them."""
        given = _about()["architecture"]
        side = given["img_size"] // given["patch_size"]
        return BackboneInfo(given["embed_dim"], given["depth"], (side, side), ("cls",), given["embed_dim"])

    def build(self, device: str) -> "DigitsVitBackbone":
        """Load timm's VisionTransformer with the weights of the package."""
        mend_torchvision()
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from timm.models import VisionTransformer

        given = {key: value for key, value in _about()["architecture"].items() if key != "class"}
        model = VisionTransformer(**given)
        with as_file(files(__name__) / "weights.safetensors") as path:
            try:
                model.load_state_dict(load_file(path))
            except (OSError, SafetensorError, RuntimeError) as error:
                raise UserError(f"{path}: damaged ({error}); install saefw again") from error
        return DigitsVitBackbone(self.describe(), model, given["img_size"]).to(device).eval().requires_grad_(False)


class DigitsVitBackbone(Backbone):
    """The model, the preprocessing that it was trained with, and its head."""

    def __init__(self, info: BackboneInfo, model: nn.Module, side: int) -> None:
        """Wrap timm's model for images of `side` pixels."""
        super().__init__()
        self.info, self.side = info, side
        self._model: Any = model

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in order."""
        return list(self._model.blocks)

    def view(self, image: "Image") -> "Image":
        """Return the image as RGB, resized to the model's size."""
        from PIL.Image import Resampling

        image = image.convert("RGB")
        size = (self.side, self.side)
        return image if image.size == size else image.resize(size, Resampling.BICUBIC)

    def prepare(self, image: "Image") -> Tensor:
        """Return float32 [3, side, side] from -1 to 1."""
        pixels = np.asarray(self.view(image), dtype=np.float32) / 255
        return (torch.from_numpy(pixels).permute(2, 0, 1).contiguous() - 0.5) / 0.5

    def embed(self, images: Tensor) -> Tensor:
        """Return patch embeddings with [CLS] and positions, [batch, token, d_model]."""
        model = self._model
        tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return tokens

    def embedding(self, tokens: Tensor) -> Tensor:
        """Return [CLS] after the final norm, [batch, d_model]."""
        pooled: Tensor = self._model.forward_head(self._model.norm(tokens), pre_logits=True)
        return pooled

    def classify(self, images: Tensor) -> Tensor:
        """Return the logits [batch, class] of the head that it was trained with."""
        logits: Tensor = self._model.head(self.embedding(self(images)))
        return logits


@cache
def _about() -> dict[str, Any]:
    about: dict[str, Any] = json.loads((files(__name__) / "weights.json").read_text())
    return about


@hookimpl
def saefw_backbones() -> list[type[BackboneConfig]]:
    """Bring one: digits-vit."""
    return [DigitsVit]
