"""Watches and edits the blocks of a backbone.

Layer L is the output of block L, the residual stream after it, before any final norm. Nothing is hooked: the backbone's
own `embed` and `tail` are called, so what is recorded is what an edited pass goes on from.

Shapes: b batch, t n_tokens, d d_model; `tokens_btd` has shape [b, t, d].
"""

from collections.abc import Iterable

from torch import Tensor

from saefw.errors import UserError
from saefw.plugin import Backbone


def resolve(layer: int, n_blocks: int) -> int:
    """Return the number of a block counted from 0, given one that may count from the end (-1: the last).

    Raises:
        UserError: there is no such block.

    """
    if not -n_blocks <= layer < n_blocks:
        raise UserError(
            f"layer {layer}: there are {n_blocks} blocks, 0 to {n_blocks - 1}, or -{n_blocks} to -1 from the end"
        )
    return layer % n_blocks


def outputs(backbone: Backbone, images: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
    """Return the outputs [b, t, d] of some blocks in one pass that stops after the last of them.

    Args:
        backbone: in eval mode.
        images: prepared, float32 [b, 3, height, width], on the backbone's device.
        layers: numbers of blocks, as `resolve` returns them.

    """
    kept: dict[int, Tensor] = {}
    tokens_btd, first = backbone.embed(images), 0
    for layer in sorted(set(layers)):
        tokens_btd = kept[layer] = backbone.tail(tokens_btd, first, layer)
        first = layer + 1
    return kept


def tokens_after(backbone: Backbone, images: Tensor, layer: int) -> Tensor:
    """Return the output [b, t, d] of one block."""
    return outputs(backbone, images, [layer])[layer]


def edited_tail(backbone: Backbone, tokens_btd: Tensor, layer: int) -> Tensor:
    """Return what the last block puts out, [b, t, d], when block `layer` had put out these tokens."""
    return backbone.tail(tokens_btd, layer + 1)
