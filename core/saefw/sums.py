"""Sums whose order does not hang on how many threads make them.

Torch adds up a long tensor in as many parts as there are threads, and the gradient of `x[indices]` in whatever order
the threads come: so the same training would end with other weights beside other SAEs, or from one run to the next.

Shapes: n tokens, d d_model, s d_sae, e entries.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

PIECE = 4096
"""How many numbers are added up by one thread: few enough for torch not to split them, too."""


def total(x: Tensor) -> Tensor:
    """Return the sum of all, a scalar."""
    found: Tensor = _Total.apply(x)  # type: ignore[no-untyped-call]
    return found


def mean_square(x: Tensor) -> Tensor:
    """Return the mean of all squares of vectors [..., d], a scalar."""
    found: Tensor = _MeanSquare.apply(x)  # type: ignore[no-untyped-call]
    return found


def at(x_s: Tensor, features: Tensor | slice) -> Tensor:
    """Return x[features], of what there is for each feature what fits some entries: [e], or all of [s]."""
    if isinstance(features, slice) or x_s.device.type != "cpu":  # on a GPU it is the gradient of this that is the same
        return x_s[features]
    return x_s.index_select(0, features)


class _Total(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return _added(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found: Tensor = gradient.expand(ctx.shape)
        return found


class _MeanSquare(Function):
    # In one pass each, forward and back; a square and its mean take five.

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _added(torch.linalg.vector_norm(x, dim=-1).square()) / x.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        found: Tensor = x * (2 * gradient / x.numel())
        return found


def _added(x: Tensor) -> Tensor:
    x = x.flatten()
    while len(x) > PIECE:
        rest = -len(x) % PIECE
        x = (torch.nn.functional.pad(x, (0, rest)) if rest else x).view(-1, PIECE).sum(dim=1)
    return x.sum()
