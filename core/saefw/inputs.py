"""What a probe reads of an image, and which edits reach it.

Shapes: b images, t tokens, d d_model or, of the image embedding, d_embed; `tokens_btd` has shape [b, t, d].
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from saefw.errors import UserError
from saefw.plugin import Backbone, BackboneInfo, Unit
from saefw.shards import check_tokens

Token = Literal["cls", "mean", "embedding"] | Annotated[int, Field(ge=0)]
"""[CLS]; the mean of all patches; the image embedding; or one patch, by its number, counted row by row from 0."""


def called(token: Token) -> str:
    """Return what it is, in words."""
    if isinstance(token, int):
        return f"patch {token}"
    return {"cls": "[CLS]", "mean": "the mean of the patches", "embedding": "the image embedding"}[token]


def held(token: Token) -> str:
    """Return the tokens of a recording that it is made of: `cls`, `patches` or `all`."""
    return {"cls": "cls", "embedding": "all"}.get(str(token), "patches")


def width(info: BackboneInfo, token: Token) -> int:
    """Return how many numbers it has."""
    return info.d_embed if token == "embedding" else info.d_model


def taken(tokens_btd: Tensor, token: Token, n_prefix: int, backbone: Backbone | None = None) -> Tensor:
    """Return it of images, [b, d].

    Args:
        tokens_btd: what a block puts out, or what `held` says of it.
        token: which.
        n_prefix: how many of these tokens come before the patches.
        backbone: makes the embedding of the last block's output; not needed for the others.

    """
    if token == "embedding":
        if backbone is None:
            raise ValueError("an embedding is made by a backbone")
        return backbone.embedding(tokens_btd)
    if token == "cls":
        return tokens_btd[:, 0]
    if token == "mean":
        return tokens_btd[:, n_prefix:].mean(dim=1)
    return tokens_btd[:, n_prefix + token]


def check_input(stage: str, recording: Unit, token: Token) -> None:
    """Refuse a recording off which it cannot be read.

    Args:
        stage: which, for the text.
        recording: the unit of the recording.
        token: what is to be read.

    Raises:
        UserError: there is no such token, or it is not recorded.

    """
    info: BackboneInfo = recording.given["backbone"].describe()
    fits = {"cls": ("all", "cls"), "patches": ("all", "patches"), "all": ("all",)}[held(token)]
    check_tokens(f"{stage}: token", recording, *fits)
    n_patches, last = info.n_tokens - info.n_prefix, info.n_blocks - 1
    if token == "cls" and not info.has_cls:
        raise UserError(
            f"{stage}: token: the backbone of {recording.label} has no [CLS], which the probe would read; "
            "say token: mean"
        )
    if isinstance(token, int) and token >= n_patches:
        raise UserError(
            f"{stage}: token: the backbone of {recording.label} has {n_patches} patches, 0 to {n_patches - 1} "
            f"(got {token})"
        )
    if token == "embedding" and not info.d_embed:
        raise UserError(f"{stage}: token: the backbone of {recording.label} gives no image embedding")
    if token == "embedding" and (layer := recording.content["layer"]) != last:
        raise UserError(
            f"{stage}: token: the image embedding is made of the last block's output, layer {last} (got layer {layer})"
        )


def check_reach(stage: str, info: BackboneInfo, layer: int, probe_layer: int, place: str, token: Token) -> None:
    """See that an edit of tokens after block `layer` reaches a probe after block `probe_layer`.

    Each block passes on what any token holds to all of them; within the same block's output an edit is only where it
    was made.

    Args:
        stage: which, for the text.
        info: the backbone.
        layer: counted from 0.
        probe_layer: counted from 0.
        place: the tokens that are edited, `patches` or `cls`.
        token: what the probe reads.

    Raises:
        UserError: it does not; the text says what would.

    """
    # What is pooled into the embedding is not known without the model: of one with [CLS] it may be [CLS] alone.
    reads = ("cls" if info.has_cls else "patches") if token == "embedding" else held(token)
    at_once = reads == place
    if probe_layer > layer or (probe_layer == layer and at_once):
        return
    ways, after = [], layer if at_once else layer + 1
    if (before := probe_layer if at_once else probe_layer - 1) >= 0:
        ways.append(f"an SAE of layer {before}{' or lower' if before else ''}")
    if after < info.n_blocks and token != "embedding":
        ways.append(f"a probe of layer {after}{' or higher' if after < info.n_blocks - 1 else ''}")
    if not at_once:
        ways.append(f"a probe with token: {'cls' if place == 'cls' else 'mean'} of layer {layer}")
    listed = ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])}, or {ways[-1]}"
    verb = "may not reach" if token == "embedding" and not at_once and probe_layer == layer else "cannot reach"
    edited = called("cls") if place == "cls" else place
    raise UserError(
        f"{stage}: the probe reads {called(token)} after block {probe_layer}, which {edited} edited after block "
        f"{layer} {verb}; choose {listed}"
    )
