"""Vision towers of open_clip, shrunken, with random weights: against open_clip itself."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from saefw.blocks import edited_tail, outputs
from saefw.plugin import Backbone, BackboneInfo, Place
from saefw.testing import check_backbone
from saefw_open_clip import OpenClip
from saefw_open_clip.library import model_of, written

SMALL = {"layers": 3, "width": 48, "head_width": 16}
"""What an own tower is shrunken to."""

TRUNK = {"embed_dim": 48, "depth": 3}
"""What a timm trunk is shrunken to."""

TOWERS: dict[str, tuple[str, Mapping[str, Any], BackboneInfo]] = {
    "ViT-B-32": ("ViT-B-32", SMALL, BackboneInfo(48, 3, (7, 7), ("cls",), 64)),
    "QuickGELU": ("ViT-B-16-quickgelu", SMALL, BackboneInfo(48, 3, (14, 14), ("cls",), 64)),
    "ViT-L-14": ("ViT-L-14", SMALL, BackboneInfo(48, 3, (16, 16), ("cls",), 64)),
    "layer scale": ("ViT-S-16-alt", SMALL, BackboneInfo(48, 3, (14, 14), ("cls",), 64)),
    "CLIPA": ("ViT-L-14-CLIPA", SMALL, BackboneInfo(48, 3, (16, 16), ("cls",), 64)),
    "avg": ("ViT-B-32", {**SMALL, "pool_type": "avg"}, BackboneInfo(48, 3, (7, 7), ("cls",), 64)),
    "CoCa": ("coca_ViT-L-14", SMALL, BackboneInfo(48, 3, (16, 16), ("cls",), 64)),
    "CoCa without pooler": ("coca_base", SMALL, BackboneInfo(48, 3, (16, 16), ("cls",), 64)),
    "other blocks": ("ViT-B-32", {**SMALL, "qk_norm": True}, BackboneInfo(48, 3, (7, 7), ("cls",), 64)),
    "wide": ("ViT-B-16", {**SMALL, "image_size": [48, 96]}, BackboneInfo(48, 3, (3, 6), ("cls",), 64)),
    "SigLIP": ("ViT-B-16-SigLIP", {**TRUNK, "num_heads": 3}, BackboneInfo(48, 3, (14, 14), (), 64)),
    "SigLIP2": ("ViT-SO400M-14-SigLIP2", {**TRUNK, "num_heads": 3}, BackboneInfo(48, 3, (16, 16), (), 64)),
    "EVA02": ("EVA02-B-16", {**TRUNK, "num_heads": 3}, BackboneInfo(48, 3, (14, 14), ("cls",), 64)),
    "EVA01": ("EVA01-g-14", {**TRUNK, "num_heads": 3}, BackboneInfo(48, 3, (16, 16), ("cls",), 64)),
    "PE core": ("PE-Core-B-16", {**TRUNK, "num_heads": 3}, BackboneInfo(48, 3, (14, 14), ("cls",), 64)),
    "PE core without [CLS]": ("PE-Core-bigG-14-448", {**TRUNK, "num_heads": 3}, BackboneInfo(48, 3, (32, 32), (), 64)),
    "MobileCLIP": ("MobileCLIP-B", {"depth": 1}, BackboneInfo(768, 1, (14, 14), ("cls",), 64)),
    "ViTamin": ("ViTamin-S", {"depth": 2}, BackboneInfo(384, 2, (14, 14), (), 64)),
    "gap": ("vit_medium_patch16_gap_256", {**TRUNK, "num_heads": 3}, BackboneInfo(48, 3, (16, 16), (), 64)),
    "relative positions": (
        "vit_relpos_medium_patch16_cls_224", {**TRUNK, "num_heads": 3}, BackboneInfo(48, 3, (14, 14), ("cls",), 64),
    ),
    "shared relative positions": (
        "vit_relpos_medium_patch16_cls_224",
        {**TRUNK, "num_heads": 3, "timm_model_name": "vit_srelpos_small_patch16_224"},
        BackboneInfo(48, 3, (14, 14), (), 64),
    ),
    "registers": (
        "vit_medium_patch16_gap_256",
        {**TRUNK, "num_heads": 3, "timm_model_name": "vit_little_patch16_reg4_gap_256"},
        BackboneInfo(48, 3, (16, 16), ("register",) * 4, 64),
    ),
    "mixed rotary positions": (
        "EVA02-B-16",
        {**TRUNK, "num_heads": 3, "timm_model_name": "vit_small_patch16_rope_mixed_224"},
        BackboneInfo(48, 3, (14, 14), ("cls",), 64),
    ),
    "distilled": (
        "vit_medium_patch16_gap_256",
        {**TRUNK, "num_heads": 3, "timm_model_name": "deit_tiny_distilled_patch16_224", "image_size": 224},
        BackboneInfo(48, 3, (14, 14), ("cls", "dist"), 64),
    ),
}  # fmt: skip
"""By a name: the architecture, what of its vision_cfg is smaller here, and the shapes to be."""


def shrunken(folder: Path, arch: str, vision: Mapping[str, Any], **more: Any) -> OpenClip:
    """Write the shrunken config of an architecture and random weights for it."""
    config = written(Place(arch))[0]
    config["embed_dim"] = 64
    config["vision_cfg"] |= {key: x for key, x in vision.items() if key not in ("embed_dim", "depth", "num_heads")}
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_name"] = shrunken_trunk(config["vision_cfg"]["timm_model_name"], vision)
    if config["vision_cfg"].get("timm_proj") == "none":
        config["vision_cfg"]["timm_proj"] = "linear"  # the width of SigLIP's trunk is that of its embedding
    config["text_cfg"] |= {"width": 32, "heads": 2, "layers": 2}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": 32, "heads": 2, "layers": 1}
        config["vision_cfg"] |= {"attn_pooler_heads": 4, "attn_pooler_queries": 8}
    config |= more
    (folder / f"{arch}.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = model_of(config).state_dict()
        # Fresh weights are so small that blocks hardly change their input, and some are zero; these do.
        for x in state.values():
            if x.ndim > 1:
                x.copy_(torch.randn_like(x) / x[0].numel() ** 0.5)
            elif x.is_floating_point():
                x.add_(torch.randn_like(x) * 0.2)
    save_file({k: x.clone() for k, x in state.items()}, folder / "weights.safetensors")
    return OpenClip(arch=Place(folder / f"{arch}.json"), pretrained=Place(folder / "weights.safetensors"))


def shrunken_trunk(name: str, vision: Mapping[str, Any]) -> str:
    """Register timm's own model once more, smaller, as open_clip gives a trunk nothing but its name."""
    import timm
    from timm.models import is_model, register_model

    small = {key: vision[key] for key in ("embed_dim", "depth", "num_heads") if key in vision}

    def build(pretrained: bool = False, **given: Any) -> Any:
        return timm.create_model(name, **small, **given)

    build.__name__ = f"shrunken_{name}"
    if not is_model(build.__name__):
        register_model(build)
    return build.__name__


def pictures() -> list[Image.Image]:
    """Wide, tall, tiny, exact, grey, with a palette, with transparency."""
    rng = np.random.default_rng(0)
    sizes = ((61, 183, 3), (290, 47, 3), (5, 4, 3), (224, 224, 3), (40, 70), (33, 70, 4))
    found = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes]
    return [*found, found[0].convert("P"), found[1].convert("1")]


@pytest.mark.parametrize("name", TOWERS)
def test_it_is_open_clip(name: str, tmp_path: Path) -> None:
    """Blocks are those of its intermediate features, tails the whole pass, the embedding that of encode_image."""
    arch, vision, info = TOWERS[name]
    config = shrunken(tmp_path, arch, vision)
    assert config.describe() == info
    check_backbone(config)
    clip = config.build("cpu")
    model, visual = clip._model, clip._model.visual
    images = torch.stack([clip.prepare(picture) for picture in pictures()[:2]])
    expected: dict[int, torch.Tensor] = {}
    if hasattr(getattr(visual, "trunk", visual), "forward_intermediates"):
        found = visual.forward_intermediates(images, output_fmt="NLC", output_extra_tokens=bool(info.prefix))
        patches = found["image_intermediates"]
        first = found.get("image_intermediates_prefix", [x[:, :0] for x in patches])
        expected = {i: torch.cat([a, b], 1) for i, (a, b) in enumerate(zip(first, patches, strict=True))}
    else:  # VisionTransformerRelPos has none
        hooks = [
            block.register_forward_hook(lambda module, args, out, i=i: expected.update({i: out}))
            for i, block in enumerate(clip.blocks)
        ]
        visual(images)
        for hook in hooks:
            hook.remove()
    ours = outputs(clip, images, range(info.n_blocks))
    assert len(expected) == info.n_blocks
    for layer, tokens in ours.items():
        torch.testing.assert_close(tokens, expected[layer], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(edited_tail(clip, tokens, layer), ours[info.n_blocks - 1], rtol=1e-5, atol=1e-5)
        if layer and info.has_cls:
            torch.testing.assert_close(clip.cls_after(ours[layer - 1], layer), tokens[:, 0], rtol=1e-5, atol=1e-5)
    embedded = clip.embed(images)
    moved = (ours[info.n_blocks - 1] - embedded).norm() / embedded.norm()
    assert moved > 0.1, "the blocks change their input, or nothing was compared"
    whole = model.encode_image(images, normalize=False)
    torch.testing.assert_close(clip.embedding(clip(images)), whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole[0], whole[1], atol=1e-3)
    assert_painted_patch_is_lit(clip)


def assert_painted_patch_is_lit(clip: Backbone) -> None:
    """A white patch on a wide and on a tall black image lies at its place in the view, and changes its own token."""
    rows, columns = clip.info.grid
    row, column = 1, columns - 2
    width, height = clip.view(Image.new("RGB", (500, 500))).size
    side_y, side_x = height // rows, width // columns
    for wide in (True, False):
        size = (3 * width, height) if wide else (width, 3 * height)
        black, painted = np.zeros((*size[::-1], 3), np.uint8), np.zeros((*size[::-1], 3), np.uint8)
        y = row * side_y + (0 if wide else height)
        x = column * side_x + (width if wide else 0)
        painted[y : y + side_y, x : x + side_x] = 255
        lit = np.asarray(clip.view(Image.fromarray(painted)))[..., 0] == 255
        expected = np.zeros((height, width), bool)
        expected[row * side_y : (row + 1) * side_y, column * side_x : (column + 1) * side_x] = True
        assert (lit == expected).all()
        tokens = [clip.embed(clip.prepare(Image.fromarray(pixels))[None])[0] for pixels in (black, painted)]
        changed = (tokens[0] - tokens[1]).norm(dim=1)
        assert changed.argmax() == clip.info.n_prefix + row * columns + column


WAYS: dict[str, dict[str, Any]] = {
    "CLIP": {},
    "SigLIP": dict(mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash"),
    "bilinear": dict(mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear"),
    "longest": dict(resize_mode="longest", fill_color=127),
}
"""What an open_clip_config.json may say of preprocessing."""


@pytest.mark.parametrize("image_size", [96, [64, 128], [128, 64]])
@pytest.mark.parametrize("way", WAYS)
def test_view_is_the_crop_that_is_fed(way: str, image_size: Any, tmp_path: Path) -> None:
    """Pixel for pixel what open_clip's transform makes, also of pictures that are tiny, grey or have a palette."""
    from open_clip.transform import image_transform

    config = shrunken(tmp_path, "ViT-B-32", {**SMALL, "image_size": image_size})
    about = tmp_path / "open_clip_config.json"
    about.write_text(
        json.dumps({"model_cfg": json.loads((tmp_path / "ViT-B-32.json").read_text()), "preprocess_cfg": WAYS[way]})
    )
    clip = config.model_copy(update={"arch": Place(about)}).build("cpu")
    theirs = image_transform(image_size if isinstance(image_size, int) else tuple(image_size), False, **WAYS[way])
    for picture in pictures():
        prepared, view = clip.prepare(picture), clip.view(picture)
        assert torch.equal(prepared, theirs(picture))
        mean, std = theirs.transforms[-1].mean, theirs.transforms[-1].std
        pixels = (np.asarray(view, np.float32) / 255 - np.float32(mean)) / np.float32(std)
        np.testing.assert_allclose(pixels.transpose(2, 0, 1), prepared.numpy(), rtol=1e-5, atol=1e-6)
        assert view.mode == "RGB" and view.size[::-1] == tuple(prepared.shape[1:])


def test_a_name_and_a_file_are_what_open_clip_makes_of_them(tmp_path: Path) -> None:
    import open_clip

    config, _ = written(Place("ViT-S-32-alt"))
    torch.manual_seed(0)
    weights = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"module.{k}": x for k, x in model_of(config).state_dict().items()}}, weights)
    clip = OpenClip(arch="ViT-S/32-alt", pretrained=str(weights)).build("cpu")
    model, _, transform = open_clip.create_model_and_transforms("ViT-S-32-alt", pretrained=str(weights))
    model.eval()
    images = torch.stack([clip.prepare(picture) for picture in pictures()[:3]])
    assert torch.equal(images, torch.stack([transform(picture) for picture in pictures()[:3]]))
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(clip.embedding(clip(images)), model.encode_image(images), **tolerance)
    prompts = ["a photo of a cat", "two", "a long text " * 50]
    theirs = model.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(prompts))
    torch.testing.assert_close(clip.text(prompts), theirs, **tolerance)
    assert clip.text(prompts).shape == (3, clip.info.d_embed) == (3, 256)
    assert clip.logit_scale == pytest.approx(1 / 0.07) and clip.logit_bias == 0


def test_texts_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = shrunken(tmp_path, "coca_ViT-B-32", SMALL).build("cpu")
    prompts = [f"{i} birds" for i in range(7)]
    whole = clip.text(prompts)
    monkeypatch.setattr("saefw_open_clip.PROMPTS", 3)
    torch.testing.assert_close(clip.text(prompts), whole)
    assert len(set(whole[:, 0].tolist())) == 7


def test_bias_of_siglip(tmp_path: Path) -> None:
    clip = shrunken(tmp_path, "ViT-B-32", SMALL, init_logit_bias=-10, init_logit_scale=2.0).build("cpu")
    assert clip.logit_bias == pytest.approx(-10, abs=1) and clip.logit_bias == float(clip._model.logit_bias)
    assert clip.logit_scale == pytest.approx(float(clip._model.logit_scale.exp()))


@pytest.mark.parametrize("arch", ["ViT-B-16-SigLIP", "ViT-L-14-CLIPA", "PE-Core-B-16"])
def test_a_file_of_a_known_architecture_is_prepared_as_its_tags(arch: str) -> None:
    import open_clip

    _, preprocess = written(Place(arch))
    (tag,) = open_clip.list_pretrained_tags_by_model(arch)[:1]
    given = open_clip.get_pretrained_cfg(arch, tag)
    assert preprocess and all(given[key] == value for key, value in preprocess.items())
    assert preprocess["resize_mode"] == "squash"
    assert written(Place("ViT-L-14"))[1] == {}, "its tags differ"
