"""Watches and edits the blocks of a backbone.

Layer L is the output of block L, the residual stream after it, before any final norm. Each block is called once, in
order; nothing is hooked, so what is recorded is by construction what `tail` goes on from.

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
    wanted = set(layers)
    kept: dict[int, Tensor] = {}
    if wanted:
        tokens_btd = backbone.embed(images)
        for number, block in enumerate(backbone.blocks[: max(wanted) + 1]):
            tokens_btd = block(tokens_btd)
            if number in wanted:
                kept[number] = tokens_btd
    return kept


def tokens_after(backbone: Backbone, images: Tensor, layer: int) -> Tensor:
    """Return the output [b, t, d] of one block."""
    return outputs(backbone, images, [layer])[layer]


def edited_tail(backbone: Backbone, tokens_btd: Tensor, layer: int) -> Tensor:
    """Return what the last block puts out, [b, t, d], when block `layer` had put out these tokens."""
    return backbone.tail(tokens_btd, layer + 1)
