"""The accuracies of the weights in $SAEFW_DATA, through open_clip: skipped where that folder is not."""

import lzma
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saefw.plugin import mend_torchvision, open_image
from saefw_open_clip import OpenClip, OpenClipBackbone

DATA = os.environ.get("SAEFW_DATA", "")

pytestmark = pytest.mark.skipif(
    not Path(DATA, "weights", "openclip").is_dir() or not DATA,
    reason="the variable SAEFW_DATA names no folder with weights/openclip",
)


@pytest.fixture
def clip(tmp_path: Path) -> OpenClipBackbone:
    """DeiT-Tiny as a tower of open_clip, with a projection into CLIP's text space."""
    weights = tmp_path / "vit_ti_16_deit_clip512.safetensors"
    packed = Path(DATA, "weights", "openclip", "vit_ti_16_deit_clip512.fp16.safetensors.xz")
    weights.write_bytes(lzma.decompress(packed.read_bytes()))
    config = OpenClip(arch="$SAEFW_DATA/weights/openclip/ViT-Ti-16-deit.json", pretrained=str(weights))
    assert config.describe() == (192, 12, (14, 14), ("cls",), 512)
    return config.build("cpu")


def photos() -> list[Path]:
    """One image a class, in the order of the classes."""
    folders = sorted(Path(DATA, "images", "imagenet1k_sample").iterdir())
    return [next(file for file in folder.iterdir()) for folder in folders if folder.is_dir()]


@torch.inference_mode()
def test_class_embeddings_read_the_sample(clip: OpenClipBackbone) -> None:
    """The text embeddings of CLIP name 66.0 % of 1000 images of 1000 classes."""
    files = photos()
    text = np.load(Path(DATA, "weights", "openclip", "clip_vit_b32_datacomp_imagenet1k_text.fp16.npy"))
    text_ce = torch.from_numpy(text.astype(np.float32))
    assert len(files) == len(text_ce) == 1000
    right = 0
    for start in range(0, 1000, 50):
        images = torch.stack([clip.prepare(open_image(file)) for file in files[start : start + 50]])
        embedding_be = torch.nn.functional.normalize(clip.embedding(clip(images)), dim=1)
        right += int((((embedding_be @ text_ce.T).argmax(1)) == torch.arange(start, start + 50)).sum())
    assert right / 1000 == pytest.approx(0.660, abs=0.0015)


@torch.inference_mode()
def test_the_tower_is_deit_of_timm(clip: OpenClipBackbone) -> None:
    """The same weights in timm's form give the same tokens.

    The other normalisation of pixels is folded into the patch embedding and the positions, and these were rounded to
    float16 after that; folded anew, in float64, the tokens are timm's.
    """
    mend_torchvision()
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.data.transforms_factory import create_transform

    deit: Any = timm.create_model(
        "deit_tiny_patch16_224",
        checkpoint_path=str(Path(DATA, "weights", "deit_tiny_patch16_224.fp16.safetensors")),
    ).eval()
    transform: Any = create_transform(**resolve_model_data_config(deit))  # type: ignore[no-untyped-call]
    numbers, normalise = transform.transforms[-2:]
    ours: Any = clip._normalise
    views = [clip.view(open_image(file)) for file in photos()[::100]]
    theirs = deit.forward_features(torch.stack([normalise(numbers(view)) for view in views]))
    prepared, visual = torch.stack([clip.prepare(view) for view in views]), clip._model.visual
    stored = visual.ln_post(clip(prepared))
    cosines = torch.nn.functional.cosine_similarity(stored[:, 0], theirs[:, 0])

    clip.double()
    deit.double()
    pixels = torch.stack([numbers(view) for view in views]).double()
    mean, std = (
        torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    ours_mean, ours_std = (torch.as_tensor(x).double()[:, None, None] for x in (ours.mean, ours.std))
    kernel, bias = deit.patch_embed.proj.weight, deit.patch_embed.proj.bias
    positions = deit.pos_embed[0].clone()
    positions[1:] += bias + (kernel * ((ours_mean - mean) / std)).sum((1, 2, 3))
    visual.conv1.weight.copy_(kernel * (ours_std / std))
    visual.positional_embedding.copy_(positions)
    folded = visual.ln_post(clip((pixels - ours_mean) / ours_std))
    difference = float((folded - deit.forward_features((pixels - mean) / std)).abs().max())
    print(f"as stored, cosine of [CLS] at least {cosines.min():.6f}; folded anew, largest difference {difference:.1e}")
    assert cosines.min() > 0.9999 and difference < 1e-9
