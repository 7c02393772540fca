"""What is asked of open_clip: its architectures, tags, weights and tokenizers."""

import json
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saefw.plugin import BackboneInfo, Place, Prefix, UserError, mend_torchvision

HUB = "hf-hub:"
"""How open_clip spells a repository of huggingface.co."""

BIOCLIP = {
    "imageomics/bioclip": "ViT-B-16",
    "imageomics/bioclip-vit-b-16-inat-only": "ViT-B-16",
    "imageomics/bioclip-2": "ViT-L-14",
    "imageomics/bioclip-2.5-vith14": "ViT-H-14",
}
"""Repositories that no tag of open_clip stands for, with the architecture that has their shapes."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz")
"""How files with weights end."""


# Architectures


def ready() -> None:
    """Make open_clip importable; it takes seconds, so it is imported by those who use it only."""
    mend_torchvision()
    import open_clip  # noqa: F401


def written(arch: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config of an architecture by its name or its file, and how images are prepared for it.

    Raises:
        UserError: there is none.

    """
    ready()
    import open_clip

    if arch.endswith(".json"):
        return read(arch.open())
    names = open_clip.list_models()
    if arch not in names:
        near = get_close_matches(arch, names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f" (there are: {', '.join(_vits()[:8])}, ...)"
        raise UserError(f"open_clip has no architecture '{arch}'{hint}")
    # SigLIP and others are never prepared as CLIP is, which open_clip knows of their tags alone.
    tags = [open_clip.get_pretrained_cfg(arch, tag) for tag in open_clip.list_pretrained_tags_by_model(arch)]
    ways = [{key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode")} for tag in tags]
    return open_clip.get_model_config(arch), ways[0] if ways and all(way == ways[0] for way in ways) else {}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config in a file of open_clip's form or an open_clip_config.json, and how images are prepared.

    Raises:
        UserError: it is not there, or holds something else.

    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read as JSON: {reason}") from None
    if not isinstance(about, dict):
        raise UserError(f"{path}: the config of a model is a mapping")
    return about.get("model_cfg", about), about.get("preprocess_cfg", {})


def of_hub(repository: str) -> dict[str, Any]:
    """Return a config with the shapes of a repository's model, without asking the hub.

    Raises:
        UserError: they are not known.

    """
    ready()
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    if repository in BIOCLIP:
        return written(Place(BIOCLIP[repository]))[0]
    for arch, tag in open_clip.list_pretrained():
        if open_clip.get_pretrained_cfg(arch, tag).get("hf_hub") == f"{repository}/":
            return written(Place(arch))[0]
    cached = try_to_load_from_cache(repository, "open_clip_config.json")
    if not isinstance(cached, str):
        raise UserError(
            f"the shapes of {repository} are not known without its open_clip_config.json: say them by arch, or run "
            f"`hf download {repository}` first"
        )
    return read(Path(cached))[0]


def described(config: dict[str, Any]) -> BackboneInfo:
    """Return the shapes of a config's vision tower.

    Raises:
        UserError: it is no config, or its tower is no vision transformer.

    """
    return _built(json.dumps(config))


@cache
def _built(config: str) -> BackboneInfo:
    """Build the vision tower without memory for its weights, and look at it."""
    from open_clip.model import _build_vision_tower

    def build(embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool = False, **_: Any) -> Any:
        return _build_vision_tower(embed_dim, vision_cfg, quick_gelu)

    given = json.loads(config)
    with torch.device("meta"):
        visual = made(build, given)
    return shapes(visual, given["embed_dim"])[0]


def made(build: Callable[..., Any], config: dict[str, Any]) -> Any:
    """Return what `build` makes of a config, with random weights.

    Raises:
        UserError: it can make nothing of it.

    """
    try:
        given: dict[str, Any] = json.loads(json.dumps(config))
        # Weights of one tower alone would be downloaded, and then overwritten.
        given["vision_cfg"]["timm_model_pretrained"] = given["text_cfg"]["hf_model_pretrained"] = False
        if ":" in (given["vision_cfg"].get("timm_model_name") or ""):
            raise ValueError("timm_model_name must be one of timm's own names")
        return build(**given)
    except KeyError as error:
        raise UserError(f"the config of a model says {error} too") from None
    except (AssertionError, AttributeError, IndexError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"open_clip can make no model of this config: {reason}") from error


def shapes(visual: Any, d_embed: int) -> tuple[BackboneInfo, tuple[int, int]]:
    """Return the shapes of a vision tower, and the size of the images that it takes: height, width.

    Raises:
        UserError: it is no vision transformer.

    """
    import open_clip
    from open_clip.transformer import VisionTransformer
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    if isinstance(visual, VisionTransformer):
        # A tower that pools nothing gives tokens, as those of CoCa's paper do.
        d_embed = 0 if visual.pool_type == "none" else d_embed
        width, blocks = visual.transformer.width, visual.transformer.resblocks
        return BackboneInfo(width, len(blocks), visual.grid_size, ("cls",), d_embed), visual.image_size
    trunk: Any = getattr(visual, "trunk", None)
    if not isinstance(trunk, (TimmVisionTransformer, Eva, VisionTransformerRelPos)):
        kind = type(visual if trunk is None else trunk).__name__
        same = [name for name in _vits() if open_clip.get_model_config(name)["embed_dim"] == d_embed]
        raise UserError(
            f"its vision tower is a {kind}, no vision transformer; with embeddings as wide there are "
            f"{', '.join(same[:5] or _vits()[:5])}"
        )
    prefix: list[Prefix] = ["cls"] if trunk.cls_token is not None else []
    prefix += ["dist"] if getattr(trunk, "dist_token", None) is not None else []
    prefix += ["register"] * (trunk.num_prefix_tokens - len(prefix))
    # The trunk's own size: the config of ViTamin-XL-384 says 256, which its trunk does not take.
    patches: Any = trunk.patch_embed
    return BackboneInfo(trunk.embed_dim, len(trunk.blocks), patches.grid_size, tuple(prefix), d_embed), patches.img_size


def _vits() -> list[str]:
    """Return names of architectures that are vision transformers, for those who look for one."""
    import open_clip

    return [name for name in open_clip.list_models() if name.startswith("ViT-")]


# Weights


def is_file(pretrained: str) -> bool:
    """Whether it is written as a path, which no tag looks like."""
    return pretrained.endswith(WEIGHTS) or any(sign in pretrained for sign in "/\\$~")


def tag_of(arch: str, tag: str) -> str:
    """Return a tag of an architecture as open_clip spells it.

    Raises:
        ValueError: the architecture has no such tag, or not the activation function that was trained with.

    """
    import open_clip

    def tags(name: str) -> list[str]:
        found: list[str] = open_clip.list_pretrained_tags_by_model(name)
        return found

    clean = tag.lower().replace("-", "_")
    plain = arch.removesuffix("-quickgelu")
    if clean in tags(arch):
        trained = open_clip.get_pretrained_cfg(arch, clean).get("quick_gelu", False)
        if trained and not open_clip.get_model_config(arch).get("quick_gelu", False):
            raise ValueError(f"trained with QuickGELU, which {arch} has not; write arch: {arch}-quickgelu")
        return clean
    if clean in tags(plain):
        raise ValueError(f"trained without QuickGELU, which {arch} has; write arch: {plain}")
    near = get_close_matches(clean, tags(arch), n=1)
    if near:
        raise ValueError(f"{arch} has no tag '{tag}'; did you mean '{near[0]}'?")
    others = [name for name in open_clip.list_pretrained_models_by_tag(clean) if name.startswith("ViT-")]
    there = f" (there are: {', '.join(tags(arch))})" if tags(arch) else ""
    of = f"; it is one of {', '.join(others[:5])}" if others else "; a file is written with its folder: ./FILE"
    raise ValueError(f"{arch} has no tag '{tag}'{there}{of}")


def model_of(config: dict[str, Any]) -> Any:
    """Return open_clip's model with random weights, of the class that `open_clip.create_model` would choose."""
    import open_clip

    def build(custom_text: bool = False, **given: Any) -> Any:
        if not (custom_text or "hf_model_name" in given["text_cfg"]):
            return open_clip.CLIP(**given)
        return (open_clip.CoCa if "multimodal_cfg" in given else open_clip.CustomTextCLIP)(**given)

    return made(build, config)


def transform_of(preprocess: dict[str, Any], size: tuple[int, int]) -> Sequence[Callable[..., Any]]:
    """Return the steps of open_clip's transform for inference; the last two make numbers of a picture, and normalise.

    Raises:
        UserError: it knows no such way.

    """
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    try:
        given = merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), preprocess), {"size": size})
        steps: Sequence[Callable[..., Any]] = image_transform_v2(PreprocessCfg(**given), is_train=False).transforms
    except (AssertionError, AttributeError, TypeError, ValueError):
        raise UserError(f"open_clip can prepare no images as preprocess_cfg says: {json.dumps(preprocess)}") from None
    return steps


def load(model: nn.Module, path: Path, pretrained: str) -> None:
    """Load a file of weights into open_clip's model.

    Raises:
        UserError: it is not there, or holds something else.

    """
    import open_clip

    if not path.is_file():
        raise UserError(f"pretrained: '{pretrained}': there is no file {path}")
    try:
        if path.suffix not in (".safetensors", ".npz"):
            # Where this raises TypeError, open_clip would read the file again, and run the code in it.
            torch.load(path, map_location="cpu", weights_only=True)
        open_clip.load_checkpoint(model, str(path))
    except Exception as error:  # a strange file makes torch, safetensors and open_clip raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"pretrained: {path} does not hold the weights of this architecture: "
            f"{reason if len(reason) <= 200 else reason[:197] + '...'}"
        ) from error


# Texts


@cache
def tokenizer_of(text: str) -> Any:
    """Return the tokenizer that the `text_cfg` of a model names.

    Raises:
        UserError: it is one of huggingface.co that cannot be loaded.

    """
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

    given = json.loads(text)
    length = given.get("context_length", DEFAULT_CONTEXT_LENGTH)
    more = given.get("tokenizer_kwargs") or {}
    name = given.get("hf_tokenizer_name")
    if not name:
        return SimpleTokenizer(context_length=length, **more)
    try:
        return HFTokenizer(name, length, tokenizer_mode=given.get("tokenizer_mode"), **more)
    except ImportError:
        raise UserError(f"the texts of this model need the tokenizer {name}: pip install transformers") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tokenizer {name} is not on this machine and cannot be downloaded; run `hf download {name}` where "
            "there is a network"
        ) from error
