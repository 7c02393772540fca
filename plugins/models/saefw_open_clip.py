"""The vision towers of open_clip that are ViTs: its own VisionTransformer and timm trunks."""

import json
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor, nn

from saefw.plugin import Backbone, BackboneConfig, BackboneInfo, Place, Prefix, UserError, hookimpl, mend_torchvision

if TYPE_CHECKING:
    from PIL.Image import Image

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

PROMPTS = 256
"""Texts in one forward pass."""


class OpenClip(BackboneConfig):
    """A vision transformer of open_clip (CLIP, SigLIP, EVA, BioCLIP ...) with its text tower."""

    use: Literal["open-clip"] = "open-clip"

    arch: Place | None = None
    """The architecture by open_clip's name, or a file NAME.json of the same form. Not needed with an `hf-hub:` name of
    `pretrained` that open_clip or saefw knows; elsewhere it is."""

    pretrained: Place
    """The weights: a tag of the architecture (`openai`), `hf-hub:ORG/NAME`, or a file (.safetensors, .bin, .pt, .pth,
    .npz). A relative path, as that of `arch`, counts from the folder in which saefw runs."""

    @field_validator("arch")
    @classmethod
    def _known_arch(cls, arch: Place | None) -> Place | None:
        """Check that it is a vision transformer, without weights; return it as open_clip spells it."""
        if arch is None:
            return None
        if arch.startswith(HUB):
            raise ValueError(f"a repository holds weights too: write pretrained: {arch}, without arch")
        try:
            if not arch.endswith(".json"):
                arch = Place(arch.replace("/", "-"))
            _described(_written(arch))
        except UserError as error:
            raise ValueError(str(error)) from None
        return arch

    @field_validator("pretrained")
    @classmethod
    def _known_weights(cls, pretrained: Place, info: ValidationInfo) -> Place:
        """Check that the architecture has the tag, or that shapes are known; return a tag as open_clip spells it."""
        if "arch" not in info.data:  # wrong itself
            return pretrained
        arch: Place | None = info.data["arch"]
        if pretrained.startswith(HUB):
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", pretrained.removeprefix(HUB)):
                raise ValueError(f"a repository of huggingface.co is written {HUB}ORG/NAME")
            if arch is None:
                try:
                    _described(_hub_shapes(pretrained.removeprefix(HUB)))
                except UserError as error:
                    raise ValueError(str(error)) from None
        elif arch is None:
            raise ValueError(f"arch is required, unless this is {HUB}ORG/NAME")
        elif not _is_file(pretrained):
            return Place(_tag(arch, pretrained))
        return pretrained

    def describe(self) -> BackboneInfo:
        """Say its shapes, of the architecture built without weights."""
        if self.arch is not None:
            return _described(_written(self.arch))
        return _described(_hub_shapes(self.pretrained.removeprefix(HUB)))

    def build(self, device: str) -> "OpenClipBackbone":
        """Load it, with open_clip's own functions.

        Raises:
            UserError: the weights are not there and cannot be downloaded, or are those of another architecture.

        """
        config, preprocess, weights = self._parts()
        model = _model(config)
        _load(model, weights, self.pretrained)
        kind = TrunkBackbone if hasattr(model.visual, "trunk") else OpenClipBackbone
        return kind(model, config, preprocess).to(device).eval().requires_grad_(False)

    def _parts(self) -> tuple[dict[str, Any], dict[str, Any], Path]:
        """Return the model's config, what its preprocessing says, and the file with the weights."""
        _ready()
        from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg

        if not self.pretrained.startswith(HUB) and _is_file(self.pretrained):
            return _written(self._arch), {}, self.pretrained.open(Path())
        try:
            if not self.pretrained.startswith(HUB):
                tag = get_pretrained_cfg(self._arch, self.pretrained)
                source = f"{tag.get('hf_hub') or tag['url']}"
                return _written(self._arch), tag, Path(download_pretrained(tag))
            source = self.pretrained.removeprefix(HUB)
            about = _read(Path(download_pretrained_from_hf(source, "open_clip_config.json")))
            config = about.get("model_cfg", {})
            if _described(config) != self.describe():
                raise UserError(f"pretrained: {source} holds {_described(config)}, but arch says {self.describe()}")
            return config, about.get("preprocess_cfg", {}), Path(download_pretrained_from_hf(source))
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"pretrained: the weights of '{self.pretrained}', {source}, are not on this machine and cannot be "
                f"downloaded ({reason}); fetch the file elsewhere and write its path: pretrained: FILE"
            ) from error

    @property
    def _arch(self) -> Place:
        assert self.arch is not None, "the validators ask for it"
        return self.arch


class OpenClipBackbone(Backbone):
    """A model whose vision tower is open_clip's own VisionTransformer."""

    def __init__(self, model: nn.Module, config: dict[str, Any], preprocess: dict[str, Any]) -> None:
        """Wrap open_clip's model.

        Args:
            model: one of its classes, with a vision tower and a text tower.
            config: what it was made from.
            preprocess: mean, std, interpolation and resize_mode, where they are not those of OpenAI's CLIP.

        """
        super().__init__()
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

        self._model: Any = model
        self._text = config["text_cfg"]
        self.info, size = _info(self._model.visual, config["embed_dim"])
        self.logit_scale = float(self._model.logit_scale.exp())
        self.logit_bias = 0.0 if self._model.logit_bias is None else float(self._model.logit_bias)
        given = merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), preprocess), {"size": size})
        # The last two make numbers of the picture and normalise them.
        *self._crop, self._numbers, self._normalise = image_transform_v2(PreprocessCfg(**given), False).transforms

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in order."""
        return list(self._model.visual.transformer.resblocks)

    def view(self, image: "Image") -> "Image":
        """Return the image as open_clip's transform resizes and crops it, RGB."""
        for step in self._crop:
            image = step(image)
        return image

    def prepare(self, image: "Image") -> Tensor:
        """Return float32 [3, height, width], normalised as the weights expect it."""
        prepared: Tensor = self._normalise(self._numbers(self.view(image)))
        return prepared

    def embed(self, images: Tensor) -> Tensor:
        """Return patch embeddings with [CLS] and positions, [batch, token, d_model], after ln_pre if there is one."""
        tokens: Tensor = self._model.visual._embeds(images)
        return tokens

    def embedding(self, tokens: Tensor) -> Tensor:
        """Return what `encode_image` makes of the last block's output: final norm, pooling and projection."""
        if not self.info.d_embed:
            raise UserError("this model's vision tower pools nothing: it has no image embedding")
        visual = self._model.visual
        embedding: Tensor = visual._pool(tokens)[0] @ visual.proj
        return embedding

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings [prompt, d_embed] of texts, tokenised as the model was trained."""
        tokens = _tokenizer(json.dumps(self._text))(list(prompts)).to(next(self.parameters()).device)
        parts = [self._model.encode_text(part, normalize=False) for part in tokens.split(PROMPTS)]
        return torch.cat(parts)


class TrunkBackbone(OpenClipBackbone):
    """A model whose vision tower is a timm trunk."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in order; those of EVA take rotary positions too, see `tail`."""
        return list(self._model.visual.trunk.blocks)

    def embed(self, images: Tensor) -> Tensor:
        """Return what enters block 0, [batch, token, d_model], as the trunk's own `forward_features` makes it."""
        trunk = self._model.visual.trunk
        patches: Tensor = trunk.patch_embed(images)
        if not hasattr(trunk, "_pos_embed"):  # relative positions only
            cls = () if trunk.cls_token is None else (trunk.cls_token.expand(len(patches), -1, -1),)
            return torch.cat((*cls, patches), dim=1)
        tokens = trunk._pos_embed(patches)
        embedded: Tensor = trunk.norm_pre(tokens[0] if isinstance(tokens, tuple) else tokens)
        return embedded

    def tail(self, tokens: Tensor, first: int, last: int | None = None) -> Tensor:
        """Run the blocks from `first` to `last`, with the positions that each of them takes."""
        trunk = self._model.visual.trunk
        blocks = list(enumerate(trunk.blocks))[first : None if last is None else last + 1]
        if getattr(trunk, "shared_rel_pos", None) is not None:
            more = [{"shared_rel_pos": trunk.shared_rel_pos.get_bias()}] * len(trunk.blocks)
        elif getattr(trunk, "rope", None) is not None:
            # They depend on the grid alone: those of any patches will do.
            _, rope = trunk._pos_embed(tokens[:1, self.info.n_prefix :])
            mixed = getattr(trunk, "rope_mixed", False)
            more = [{"rope": rope[i] if mixed else rope} for i in range(len(trunk.blocks))]
        else:
            more = [{}] * len(trunk.blocks)
        for i, block in blocks:
            tokens = block(tokens, **more[i])
        return tokens

    def embedding(self, tokens: Tensor) -> Tensor:
        """Return what `encode_image` makes of the last block's output: the trunk's norm and head, and open_clip's."""
        visual = self._model.visual
        embedding: Tensor = visual.head(visual.trunk.forward_head(visual.trunk.norm(tokens)))
        return embedding


# Architectures


def _ready() -> None:
    """Make open_clip importable; it takes seconds, so it is imported by those who use it only."""
    mend_torchvision()
    import open_clip  # noqa: F401


def _written(arch: Place) -> dict[str, Any]:
    """Return the config of an architecture by its name or its file.

    Raises:
        UserError: there is none.

    """
    _ready()
    import open_clip

    if arch.endswith(".json"):
        return _read(arch.open(Path()))
    names = open_clip.list_models()
    if arch not in names:
        near = get_close_matches(arch, names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f" (there are: {', '.join(_vits()[:8])}, ...)"
        raise UserError(f"open_clip has no architecture '{arch}'{hint}")
    config: dict[str, Any] = open_clip.get_model_config(arch)
    return config


def _read(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Raises:
        UserError: it is not there, or holds something else.

    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror if isinstance(error, OSError) else error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: the config of a model is a mapping")
    return config


def _hub_shapes(repository: str) -> dict[str, Any]:
    """Return a config with the shapes of a repository's model, without asking the hub.

    Raises:
        UserError: they are not known.

    """
    _ready()
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    if repository in BIOCLIP:
        return _written(Place(BIOCLIP[repository]))
    for arch, tag in open_clip.list_pretrained():
        if open_clip.get_pretrained_cfg(arch, tag).get("hf_hub") == f"{repository}/":
            return _written(Place(arch))
    cached = try_to_load_from_cache(repository, "open_clip_config.json")
    if not isinstance(cached, str):
        raise UserError(
            f"the shapes of {repository} are not known without its open_clip_config.json: say them by arch, or run "
            f"`hf download {repository}` first"
        )
    model: dict[str, Any] = _read(Path(cached)).get("model_cfg", {})
    return model


def _described(config: dict[str, Any]) -> BackboneInfo:
    """Return the shapes of a config's vision tower.

    Raises:
        UserError: it is no config, or its tower is no vision transformer.

    """
    return _shapes(json.dumps(config))


@cache
def _shapes(config: str) -> BackboneInfo:
    """Build the vision tower without memory for its weights, and look at it."""
    from open_clip.model import _build_vision_tower

    def build(embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool = False, **_: Any) -> Any:
        return _build_vision_tower(embed_dim, vision_cfg, quick_gelu)

    given = json.loads(config)
    with torch.device("meta"):
        visual = _made(build, given)
    return _info(visual, given["embed_dim"])[0]


def _made(build: Callable[..., Any], config: dict[str, Any]) -> Any:
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


def _info(visual: Any, d_embed: int) -> tuple[BackboneInfo, tuple[int, int]]:
    """Return the shapes of a vision tower, and the size of the images that it takes: height, width.

    Raises:
        UserError: it is no vision transformer.

    """
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
        same = [name for name in _vits() if _written(Place(name))["embed_dim"] == d_embed]
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


def _is_file(pretrained: str) -> bool:
    """Whether it is written as a path, which no tag looks like."""
    return pretrained.endswith(WEIGHTS) or any(sign in pretrained for sign in "/\\$~")


def _tag(arch: str, tag: str) -> str:
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
        if trained and not _written(Place(arch)).get("quick_gelu", False):
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


def _model(config: dict[str, Any]) -> Any:
    """Return open_clip's model with random weights, of the class that `open_clip.create_model` would choose."""
    import open_clip

    def build(custom_text: bool = False, **given: Any) -> Any:
        if not (custom_text or "hf_model_name" in given["text_cfg"]):
            return open_clip.CLIP(**given)
        return (open_clip.CoCa if "multimodal_cfg" in given else open_clip.CustomTextCLIP)(**given)

    return _made(build, config)


def _load(model: nn.Module, path: Path, pretrained: str) -> None:
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
def _tokenizer(text: str) -> Any:
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


@hookimpl
def saefw_backbones() -> list[type[BackboneConfig]]:
    """Bring one: open-clip."""
    return [OpenClip]
