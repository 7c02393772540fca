"""Every model of timm that is a plain stack of ViT blocks.

The library's own parts are called in the library's own order: what enters block 0, what each block takes besides the
tokens (rotary embeddings, shared position biases), final norm and head. The tests hold all this against timm's
`forward_intermediates`.

Shapes: b batch, t n_tokens, d d_model; `tokens_btd` has shape [b, t, d].
"""

import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from saefw.plugin import Backbone, BackboneConfig, BackboneInfo, Place, Prefix, UserError, hookimpl, mend_torchvision
from saefw_timm.facts import Stack, known

if TYPE_CHECKING:
    from PIL.Image import Image

MODULES = (
    "beit",
    "deit",
    "eva",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vitamin",
)
"""The modules of timm whose models are plain stacks of ViT blocks, all of them."""

SEED = 0
"""Of random weights."""


class Timm(BackboneConfig):
    """A vision transformer of timm, by its name there, with timm's weights or those of a local file."""

    use: Literal["timm"] = "timm"

    model: str
    """Its name in timm: `vit_base_patch16_224.augreg2_in21k_ft_in1k`; without the tag after the dot: timm's first."""

    img_size: int | tuple[int, int] | None = None
    """Pixels of a side, or rows and columns; positions are interpolated. null: the size that the model is made for."""

    checkpoint: Place | None = None
    """A file of weights (safetensors, or a state that torch.save wrote) instead of a download."""

    num_classes: int | None = Field(None, ge=0)
    """Classes of the head in `checkpoint`, 0 where it has none; null: as many as the model of that name."""

    pretrained: bool = True
    """Load weights; false: random ones, always the same, as a control."""

    @field_validator("model")
    @classmethod
    def _is_a_stack(cls, model: str) -> str:
        stack(model)
        return model

    @field_validator("img_size")
    @classmethod
    def _fits_the_patches(
        cls, img_size: int | tuple[int, int] | None, info: ValidationInfo
    ) -> int | tuple[int, int] | None:
        if img_size is None or "model" not in info.data:
            return img_size
        for side, patch in zip(_sides(img_size), stack(info.data["model"]).patch, strict=True):
            if side <= 0 or side % patch:
                near = max(1, round(side / patch)) * patch
                raise ValueError(f"must be a multiple of {patch}, the side of a patch, such as {near}")
        return img_size

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        if self.checkpoint is None:
            if self.num_classes is not None:
                raise ValueError("num_classes is said of a checkpoint, and none is named")
            found = stack(self.model)
            if self.pretrained and not found.weighted:
                raise ValueError(
                    f"timm has no weights of '{found.name}': name a checkpoint, "
                    "or set pretrained: false for random ones"
                )
        elif not self.pretrained:
            raise ValueError("checkpoint names weights, and pretrained: false asks for random ones; leave one out")
        return self

    def content(self) -> dict[str, Any]:
        """Return the settings with the model's full name and the size of its images, however they were written."""
        found = stack(self.model)
        return {**super().content(), "model": found.name, "img_size": list(_sides(self.img_size or found.size))}

    def describe(self) -> BackboneInfo:
        """Say the shapes of timm's model of that name."""
        found = stack(self.model)
        sides = _sides(self.img_size or found.size)
        rows, columns = (side // patch for side, patch in zip(sides, found.patch, strict=True))
        return found.info._replace(grid=(rows, columns))

    def build(self, device: str) -> "TimmBackbone":
        """Load it.

        Raises:
            UserError: the weights cannot be downloaded, or the checkpoint is not one of this model.

        """
        found = stack(self.model)
        name, given = found.name, {"img_size": _sides(self.img_size or found.size)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            if self.checkpoint is not None:
                model = _loaded(name, self.checkpoint, self.num_classes, given)
            elif self.pretrained:
                model = _downloaded(name, given)
            else:
                model = _timm().create_model(name, **given)
        return _kind(model)(self.describe(), model).to(device).eval().requires_grad_(False)


class TimmBackbone(Backbone):
    """A VisionTransformer of timm, with the transform that its weights expect."""

    def __init__(self, info: BackboneInfo, model: Any) -> None:
        """Wrap a model whose configuration of its weights is beside it, as timm's `create_model` leaves it."""
        super().__init__()
        data = _timm().data
        self.info = info
        self._model: Any = model
        config = data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
        config["input_size"] = (3, *model.patch_embed.img_size)
        *fit, self._to_tensor, self._normalise = data.create_transform(**config, is_training=False).transforms
        self._fit = fit

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in order."""
        return list(self._model.blocks)

    def view(self, image: "Image") -> "Image":
        """Return the image as RGB, resized and cropped as timm does it to evaluate these weights."""
        image = image.convert("RGB")
        for step in self._fit:
            image = step(image)
        return image

    def prepare(self, image: "Image") -> Tensor:
        """Return the pixels of `view`, normalised as the weights expect it, float32 [3, height, width]."""
        normalised: Tensor = self._normalise(self._to_tensor(self.view(image)))
        return normalised

    def embed(self, images: Tensor) -> Tensor:
        """Return patch embeddings with prefix tokens and positions, [b, t, d]."""
        model = self._model
        tokens_btd: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return tokens_btd

    def tail(self, tokens: Tensor, first: int, last: int | None = None) -> Tensor:
        """Run the blocks from number `first` to `last`, each with what it takes besides the tokens."""
        numbers = range(len(self._model.blocks))[first : None if last is None else last + 1]
        for number, besides in zip(numbers, self._besides(tokens, numbers), strict=True):
            tokens = self._model.blocks[number](tokens, **besides)
        return tokens

    def _besides(self, tokens_btd: Tensor, numbers: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """Yield what each of some blocks takes besides the tokens."""
        yield from ({} for _ in numbers)

    def cls_after(self, tokens: Tensor, number: int) -> Tensor:
        """Return [CLS] as a block puts it out, [b, d]; timm's plain blocks are run for it alone."""
        from timm.layers.attention import Attention
        from timm.models.vision_transformer import Block

        block = self._model.blocks[number]
        if type(block) is not Block or type(block.attn) is not Attention:
            return super().cls_after(tokens, number)
        cls_b1d: Tensor = tokens[:, :1] + block.ls1(_attended(block.attn, block.norm1(tokens)))
        cls_b1d = cls_b1d + block.ls2(block.mlp(block.norm2(cls_b1d)))
        return cls_b1d[:, 0]

    def embedding(self, tokens: Tensor) -> Tensor:
        """Return what the model's head reads, [b, d_embed]: the tokens after final norm and pooling."""
        if not self.info.d_embed:
            return super().embedding(tokens)
        pooled: Tensor = self._model.forward_head(self._model.norm(tokens), pre_logits=True)
        return pooled

    def classify(self, images: Tensor) -> Tensor:
        """Return the logits [b, class] of the model's own head."""
        logits: Tensor = self._model.forward_head(self._model.norm(self(images)))
        return logits


class EvaBackbone(TimmBackbone):
    """EVA, EVA02, DINOv3, PE: rotary embeddings go into every block."""

    def embed(self, images: Tensor) -> Tensor:
        """Return patch embeddings with prefix tokens and positions, [b, t, d]."""
        tokens_btd, _ = self._model._pos_embed(self._model.patch_embed(images))
        normed_btd: Tensor = self._model.norm_pre(tokens_btd)
        return normed_btd

    def _besides(self, tokens_btd: Tensor, numbers: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        # timm makes them beside the absolute positions; they hang on the grid alone.
        patches = tokens_btd.new_zeros(1, *self.info.grid, self.info.d_model)
        _, rope = self._model._pos_embed(patches if self._model.dynamic_img_size else patches.flatten(1, 2))
        for number in numbers:
            yield {"rope": rope[number] if rope is not None and self._model.rope_mixed else rope}


class BeitBackbone(TimmBackbone):
    """BEiT: a bias of relative positions, where one is shared, goes into every block."""

    def embed(self, images: Tensor) -> Tensor:
        """Return patch embeddings with [CLS] and positions, [b, t, d]."""
        model = self._model
        tokens_btd = torch.cat([model.cls_token.expand(len(images), -1, -1), model.patch_embed(images)], dim=1)
        return tokens_btd if model.pos_embed is None else tokens_btd + model.pos_embed

    def _besides(self, tokens_btd: Tensor, numbers: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        shared = None if self._model.rel_pos_bias is None else self._model.rel_pos_bias()
        yield from ({"shared_rel_pos_bias": shared} for _ in numbers)


class RelPosBackbone(TimmBackbone):
    """ViTs that know relative positions alone; their bias, where one is shared, goes into every block."""

    def embed(self, images: Tensor) -> Tensor:
        """Return patch embeddings with [CLS], where there is one, [b, t, d]."""
        model = self._model
        tokens_btd: Tensor = model.patch_embed(images)
        if model.cls_token is None:
            return tokens_btd
        return torch.cat([model.cls_token.expand(len(images), -1, -1), tokens_btd], dim=1)

    def _besides(self, tokens_btd: Tensor, numbers: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        shared = None if self._model.shared_rel_pos is None else self._model.shared_rel_pos.get_bias()
        yield from ({"shared_rel_pos": shared} for _ in numbers)


def _attended(attention: Any, x_btd: Tensor) -> Tensor:
    """Return what timm's Attention makes of the first token, [b, 1, d]: one query, keys and values of all tokens."""
    b, width = len(x_btd), attention.attn_dim
    weight, bias = attention.qkv.weight, attention.qkv.bias

    def headed(x: Tensor, rows: slice) -> Tensor:
        """Return the parts of queries, keys or values by head: [parts, b, head, token, head_dim]."""
        made = linear(x, weight[rows], None if bias is None else bias[rows])
        return made.view(b, x.shape[1], -1, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)

    (q,), (k, v) = headed(x_btd[:, :1], slice(width)), headed(x_btd, slice(width, None))
    found = scaled_dot_product_attention(attention.q_norm(q), attention.k_norm(k), v)
    out: Tensor = attention.norm(found.transpose(1, 2).reshape(b, 1, width))
    if attention.gate is not None:
        out = out * attention.gate(x_btd[:, :1]).sigmoid()
    out = attention.proj(out)
    return out


def _kind(model: nn.Module) -> type[TimmBackbone]:
    """Return what wraps a model of timm."""
    from timm.models import Beit, Eva, VisionTransformer, VisionTransformerRelPos

    kinds = {
        VisionTransformer: TimmBackbone,
        Eva: EvaBackbone,
        Beit: BeitBackbone,
        VisionTransformerRelPos: RelPosBackbone,
    }
    return next(kind for cls, kind in kinds.items() if isinstance(model, cls))


# Names and shapes, without weights


def _timm() -> Any:
    """Import timm, which takes seconds."""
    mend_torchvision()
    import timm

    return timm


@cache
def stack(model: str) -> Stack:
    """Return what is known of a model by its name, with or without a tag.

    Where timm has to say it, the model is made on the meta device: with every layer, without memory for weights.

    Raises:
        ValueError: timm has no such model, or it is no plain stack of ViT blocks.

    """
    if (found := known(model)) is not None:
        return found
    config = _config(model)
    arch = model.partition(".")[0]
    if arch not in architectures():
        raise ValueError(f"is no plain stack of ViT blocks; near names that are: {_alike(model)}")
    name = f"{arch}.{config.tag}" if config.tag else arch
    with torch.device("meta"):
        made = _timm().create_model(name)
    size, patch = tuple(config.input_size[1:]), tuple(made.patch_embed.feat_ratio(as_scalar=False))
    return Stack(name, size, patch, bool(_timm().get_pretrained_cfg(name).has_weights), _info(made))


def _config(model: str) -> Any:
    """Return what timm knows of the weights of a model.

    Raises:
        ValueError: timm has no such model.

    """
    timm = _timm()
    from timm.models import get_arch_pretrained_cfgs, get_deprecated_models

    arch, _, tag = model.partition(".")
    if arch not in timm.list_models():
        renamed = get_deprecated_models().get(model)
        near = [renamed] if renamed else get_close_matches(arch, architectures(), n=1)
        if near:
            raise ValueError(f"timm has no such model; did you mean '{near[0]}'?")
        raise ValueError(f"timm has no such model; near names of its ViTs: {_alike(arch)}")
    tagged = get_arch_pretrained_cfgs(arch)
    if tag and model not in tagged:
        there = f"there are: {', '.join(name.partition('.')[2] for name in tagged)}" if tagged else "there are none"
        raise ValueError(f"timm has no such weights of '{arch}' ({there})")
    return timm.get_pretrained_cfg(model)


def _info(model: Any) -> BackboneInfo:
    """Return the shapes of a model on the meta device."""
    prefix: list[Prefix] = ["cls"] if model.cls_token is not None else []
    if hasattr(model, "dist_token"):
        prefix.append("dist")
    registers = getattr(model, "reg_token", None)
    prefix += ["register"] * (0 if registers is None else registers.shape[1])
    assert len(prefix) == model.num_prefix_tokens
    rows, columns = model.patch_embed.grid_size
    tokens_btd = torch.empty(1, len(prefix) + rows * columns, model.embed_dim, device="meta")
    pooled = model.eval().forward_head(model.norm(tokens_btd), pre_logits=True)
    d_embed = pooled.shape[1] if pooled.ndim == 2 else 0
    return BackboneInfo(model.embed_dim, len(model.blocks), (rows, columns), tuple(prefix), d_embed)


@cache
def architectures() -> list[str]:
    """Return the names, without tags, of all plain stacks of ViT blocks."""
    return [name for module in MODULES for name in _timm().list_models(module=module)]


def _alike(name: str) -> str:
    """Return the names of the three of them that are spelled most like a name."""
    return ", ".join(f"'{near}'" for near in get_close_matches(name.partition(".")[0], architectures(), cutoff=0))


def _sides(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of pixels."""
    return (img_size, img_size) if isinstance(img_size, int) else img_size


# Weights


def _downloaded(name: str, given: Mapping[str, Any]) -> nn.Module:
    """Return a model with timm's weights of that name, from the network or from the cache of an earlier download."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # or it tells of every try
    try:
        model: nn.Module = _timm().create_model(name, pretrained=True, **given)
    except OSError as error:
        raise UserError(
            f"the weights of timm's '{name}' cannot be downloaded, and are not in the cache ({_first(error)}); "
            "name a local file as its checkpoint"
        ) from error
    return model


def _loaded(name: str, checkpoint: Place, num_classes: int | None, given: Mapping[str, Any]) -> nn.Module:
    """Return a model with the weights of a file; timm converts what it knows, and interpolates positions."""
    path = checkpoint.open()
    if not path.is_file():
        raise UserError(f"checkpoint '{checkpoint}': there is no file {path}")
    overlay: dict[str, Any] = {"file": str(path)}
    if num_classes is not None:
        overlay["num_classes"] = num_classes
    try:
        model: nn.Module = _timm().create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **given)
    except Exception as error:  # whatever a file that is no such checkpoint makes timm stumble on
        raise UserError(f"checkpoint '{checkpoint}' is none of timm's '{name}' ({_first(error)})") from error
    return model


def _first(error: Exception) -> str:
    """Return the beginning of what an error says, on one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")


@hookimpl
def saefw_backbones() -> list[type[BackboneConfig]]:
    """Bring one: timm."""
    return [Timm]
