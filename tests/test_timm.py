"""The plugin timm, against timm's own intermediate features, transforms and checkpoints."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import saefw_timm
import torch
from PIL import Image
from saefw_timm import Timm, TimmBackbone

from saefw.blocks import edited_tail, outputs
from saefw.errors import UserError
from saefw.plugin import BackboneInfo, mend_torchvision
from saefw.testing import check_backbone, check_imports

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}


class Shrunk(Timm):
    """A model of timm with few narrow blocks and random weights under which every block matters."""

    use: Literal["timm"] = "timm"

    smaller: dict[str, Any] = SMALL
    """What timm is told besides the name and the size."""

    pretrained: bool = False
    """Never."""

    def made(self, **where: Any) -> Any:
        sides = self.content()["img_size"]
        return saefw_timm._timm().create_model(self.model, img_size=tuple(sides), **self.smaller, **where)

    def describe(self) -> BackboneInfo:
        with torch.device("meta"):
            return saefw_timm._info(self.made())

    def build(self, device: str) -> TimmBackbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.made()
            with torch.no_grad():
                for parameter in model.parameters():
                    # Fresh layer scales are near 0, so that a block would hardly be seen to lack anything.
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        kind = saefw_timm._kind(model)
        return kind(self.describe(), model).to(device).eval().requires_grad_(False)


CLS: tuple[Any, ...] = ("cls",)
REGISTERS: tuple[Any, ...] = ("register",) * 4
FLAT = {"depth": 2}

ARCHITECTURES: dict[str, tuple[Any, int, tuple[Any, ...], dict[str, Any]]] = {
    "vit_tiny_patch16_224": ("TimmBackbone", 64, CLS, SMALL),
    "deit_tiny_patch16_224": ("TimmBackbone", 64, CLS, SMALL),
    "deit_tiny_distilled_patch16_224": ("TimmBackbone", 64, ("cls", "dist"), SMALL),
    "deit3_small_patch16_224": ("TimmBackbone", 64, CLS, SMALL),
    "vit_small_patch14_dinov2": ("TimmBackbone", 56, CLS, SMALL),
    "vit_small_patch14_reg4_dinov2": ("TimmBackbone", 56, CLS + REGISTERS, SMALL),
    "vit_base_patch16_clip_224": ("TimmBackbone", 64, CLS, SMALL),
    "vit_base_patch16_siglip_224": ("TimmBackbone", 64, (), SMALL),
    "vit_medium_patch16_reg4_gap_256": ("TimmBackbone", 64, REGISTERS, SMALL),
    "vit_base_patch16_rpn_224": ("TimmBackbone", 64, (), SMALL),
    "vit_base_patch16_xp_224": ("TimmBackbone", 64, CLS, SMALL),
    "aimv2_large_patch14_224": ("TimmBackbone", 56, (), SMALL),
    "vit_intern300m_patch14_448": ("TimmBackbone", 56, CLS, SMALL),
    "vit_tiny_r_s16_p8_224": ("TimmBackbone", 64, CLS, SMALL),
    "vit_small_patch16_dinov3": ("EvaBackbone", 64, CLS + REGISTERS, SMALL),
    "vit_small_plus_patch16_dinov3": ("EvaBackbone", 64, CLS + REGISTERS, SMALL),
    "eva_large_patch14_196": ("EvaBackbone", 56, CLS, SMALL),
    "eva02_tiny_patch14_224": ("EvaBackbone", 56, CLS, SMALL),
    "eva02_enormous_patch14_clip_224": ("EvaBackbone", 56, CLS, SMALL),
    "vit_pe_core_tiny_patch16_384": ("EvaBackbone", 64, CLS, SMALL),
    "vit_pe_spatial_tiny_patch16_512": ("EvaBackbone", 64, CLS, SMALL),
    "vit_small_patch16_rope_mixed_224": ("EvaBackbone", 64, CLS, SMALL),
    "beit_base_patch16_224": ("BeitBackbone", 64, CLS, SMALL),
    "beitv2_base_patch16_224": ("BeitBackbone", 64, CLS, SMALL),
    "vit_relpos_base_patch16_cls_224": ("RelPosBackbone", 64, CLS, SMALL),
    "vit_srelpos_small_patch16_224": ("RelPosBackbone", 64, (), SMALL),
}
"""By name: what wraps it, the side of its images here, its prefix tokens, how it is shrunk."""


def configured(name: str) -> Shrunk:
    _, side, _, smaller = ARCHITECTURES[name]
    return Shrunk(model=name, img_size=(side, 2 * side), smaller=smaller)


def theirs(backbone: TimmBackbone, images: torch.Tensor) -> list[torch.Tensor]:
    """What timm's own call for intermediate features gives, prefix tokens in front."""
    n = backbone.info.n_prefix
    found = backbone._model.forward_intermediates(
        images, norm=False, output_fmt="NLC", return_prefix_tokens=n > 0, intermediates_only=True
    )
    return [torch.cat([prefix, patches], dim=1) for patches, prefix in found] if n else found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_give_what_timm_gives(name: str) -> None:
    kind, side, prefix, _ = ARCHITECTURES[name]
    config = configured(name)
    backbone = config.build("cpu")
    assert type(backbone).__name__ == kind
    info = backbone.info
    assert info.prefix == prefix
    assert info.grid[1] == 2 * info.grid[0]
    images = torch.randn(2, 3, side, 2 * side, generator=torch.Generator().manual_seed(0))
    truth = theirs(backbone, images)
    ours = outputs(backbone, images, range(info.n_blocks))
    assert len(truth) == len(ours) == info.n_blocks
    whole = backbone(images)
    for layer, tokens in enumerate(truth):
        assert torch.equal(ours[layer], tokens)
        assert torch.equal(edited_tail(backbone, tokens, layer), whole)
    assert all(float((one - two).abs().mean()) > 0.05 for one, two in zip(truth[:-1], truth[1:], strict=True))
    assert torch.equal(backbone._model.norm(whole), backbone._model.forward_features(images))
    assert torch.equal(backbone.classify(images), backbone._model(images))
    assert backbone.embedding(whole).shape == (2, info.d_embed)
