"""The vision towers of open_clip that are ViTs: its own VisionTransformer and timm trunks."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor, nn

from saefw.plugin import Backbone, BackboneConfig, BackboneInfo, Place, UserError, hookimpl
from saefw_open_clip.library import (
    HUB,
    described,
    is_file,
    load,
    model_of,
    of_hub,
    read,
    ready,
    shapes,
    tag_of,
    tokenizer_of,
    transform_of,
    written,
)

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = 256
"""Texts in one forward pass."""


class OpenClip(BackboneConfig):
    """A vision transformer of open_clip (CLIP, SigLIP, EVA, BioCLIP ...) with its text tower."""

    use: Literal["open-clip"] = "open-clip"
    has_text: ClassVar[bool] = True

    arch: Place | None = None
    """The architecture by open_clip's name, or a file: a model config as open_clip has them (NAME.json), or the
    open_clip_config.json beside a model's weights. Not needed where `pretrained` is a repository that is known."""

    pretrained: Place
    """The weights: a tag of the architecture (`openai`), `hf-hub:ORG/NAME`, or a file (.safetensors, .bin, .pt, .pth,
    .npz)."""

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
            described(written(arch)[0])
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
                    described(of_hub(pretrained.removeprefix(HUB)))
                except UserError as error:
                    raise ValueError(str(error)) from None
        elif arch is None:
            raise ValueError(f"arch is required, unless this is {HUB}ORG/NAME")
        elif not is_file(pretrained):
            return Place(tag_of(arch, pretrained))
        return pretrained

    def places(self) -> Iterator[tuple[str, Place]]:
        """Yield (field, path) of the weights, if they are a file and no name; a file as `arch` was read by now."""
        if not self.pretrained.startswith(HUB) and is_file(self.pretrained):
            yield "pretrained", self.pretrained

    def describe(self) -> BackboneInfo:
        """Say its shapes, of the architecture built without weights."""
        if self.arch is not None:
            return described(written(self.arch)[0])
        return described(of_hub(self.pretrained.removeprefix(HUB)))

    def build(self, device: str) -> "OpenClipBackbone":
        """Load it, with open_clip's own functions.

        Raises:
            UserError: the weights are not there and cannot be downloaded, or are those of another architecture.

        """
        config, preprocess, weights = self._parts()
        model = model_of(config)
        load(model, weights, self.pretrained)
        kind = TrunkBackbone if hasattr(model.visual, "trunk") else OpenClipBackbone
        return kind(model, config, preprocess).to(device).eval().requires_grad_(False)

    def _parts(self) -> tuple[dict[str, Any], dict[str, Any], Path]:
        """Return the model's config, what its preprocessing says, and the file with the weights."""
        ready()
        from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg

        if not self.pretrained.startswith(HUB) and is_file(self.pretrained):
            return *written(self._arch), self.pretrained.open()
        try:
            if not self.pretrained.startswith(HUB):
                tag = get_pretrained_cfg(self._arch, self.pretrained)
                source = f"{tag.get('hf_hub') or tag['url']}"
                return written(self._arch)[0], tag, Path(download_pretrained(tag))
            source = self.pretrained.removeprefix(HUB)
            config, preprocess = read(Path(download_pretrained_from_hf(source, "open_clip_config.json")))
            if described(config) != self.describe():
                raise UserError(f"pretrained: {source} holds {described(config)}, but arch says {self.describe()}")
            return config, preprocess, Path(download_pretrained_from_hf(source))
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

    def __init__(self, model: Any, config: dict[str, Any], preprocess: dict[str, Any]) -> None:
        """Wrap open_clip's model.

        Args:
            model: one of its classes, with a vision tower and a text tower.
            config: what it was made from.
            preprocess: mean, std, interpolation and resize_mode, where they are not those of OpenAI's CLIP.

        """
        super().__init__()
        self._model = model
        self._text = config["text_cfg"]
        self.info, size = shapes(model.visual, config["embed_dim"])
        self.logit_scale = float(model.logit_scale.detach().exp())
        self.logit_bias = 0.0 if model.logit_bias is None else float(model.logit_bias.detach())
        *self._crop, self._numbers, self._normalise = transform_of(preprocess, size)

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

    def cls_after(self, tokens: Tensor, number: int) -> Tensor:
        """Return [CLS] as a block puts it out, [batch, d_model]; open_clip's plain blocks are run for it alone."""
        from open_clip.transformer import ResidualAttentionBlock

        block: Any = self.blocks[number]
        if type(block) is not ResidualAttentionBlock:
            return super().cls_after(tokens, number)
        normed = block.ln_1(tokens)
        cls: Tensor = tokens[:, :1] + block.ls_1(block.attention(normed[:, :1], normed, normed))
        cls = cls + block.ls_2(block.mlp(block.ln_2(cls)))
        return cls[:, 0]

    def embedding(self, tokens: Tensor) -> Tensor:
        """Return what `encode_image` makes of the last block's output: final norm, pooling and projection."""
        if not self.info.d_embed:
            raise UserError("this model's vision tower pools nothing: it has no image embedding")
        visual = self._model.visual
        embedding: Tensor = visual._pool(tokens)[0] @ visual.proj
        return embedding

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings [prompt, d_embed] of texts, tokenised as the model was trained."""
        tokens = tokenizer_of(json.dumps(self._text))(list(prompts)).to(next(self.parameters()).device)
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


@hookimpl
def saefw_backbones() -> list[type[BackboneConfig]]:
    """Bring one: open-clip."""
    return [OpenClip]
