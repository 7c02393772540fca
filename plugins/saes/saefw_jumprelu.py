"""A ReLU that jumps: each feature learns the threshold above which it fires.

Shapes: n tokens, s d_sae, d d_model.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd import Function

from saefw.plugin import PenalisedConfig, SaeConfig, hookimpl
from saefw.sae import Batch, Sae, at


class JumpRelu(PenalisedConfig):
    """A threshold for each feature, learnt (Rajamanoharan et al., Jumping ahead, 2024)."""

    use: Literal["jumprelu"] = "jumprelu"

    aux: float = Field(0.0, ge=0)
    """Weight of AuxK, the loss that lets dead features learn what the others leave over; 0: none."""

    penalty: Literal["l0", "tanh"] = "l0"
    """What is small when few fire: how many do (the paper's), or tanh(4 code) (Anthropic's update of January 2025)."""

    weight: float = Field(1e-3, ge=0)
    """Weight of the penalty: its sum over the features of a token, averaged over tokens.

    The error beside it is the mean over tokens and dimensions, in units where the activations have mean square 1.
    Others sum the error over dimensions: their weight is this one times d_model.
    """

    pre_act: float = Field(0.0, ge=0)
    """Weight of how far features stay below their thresholds, the same sum and average, which wakes dead ones
    (Anthropic's update of January 2025); above 0, every step is as dear as a dense one. 0: none.
    """

    bandwidth: float = Field(0.5, gt=0)
    """Width of the window around a threshold within which pre-activations teach it, in units of codes."""

    threshold: float = Field(0.5, gt=0)
    """Where every threshold starts."""

    def build(self, d_model: int) -> "JumpReluSae":
        """Return a fresh one with these settings."""
        return JumpReluSae(d_model, self.width(d_model), self)


class JumpReluSae(Sae):
    """W_enc, what is above its feature's threshold, W_dec."""

    draws = False

    def __init__(self, d_model: int, d_sae: int, config: JumpRelu) -> None:
        """Start from tied weights and equal thresholds."""
        super().__init__(d_model, d_sae)
        self.config = config
        self.log_threshold = nn.Parameter(torch.full((d_sae,), config.threshold).log())

    def edge(self) -> Tensor | float:
        """Return the lower ends of the windows [s]: what is in one is active, as it teaches the threshold."""
        return -torch.inf if self.config.pre_act else self.log_threshold.exp() - self.config.bandwidth / 2

    def fire(self, pre: Tensor, features: Tensor | slice) -> Tensor:
        """Return the pre-activations that are above their thresholds, else 0."""
        codes: Tensor = _Jump.apply(pre, self._thresholds(pre, features), self.config.bandwidth)  # type: ignore[no-untyped-call]
        return codes

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return the error, the penalty and what pulls features up.

        Where decoder rows are free, a code counts by the norm of its row: else rows could grow and codes shrink.
        """
        terms, threshold = super().terms(batch), self._thresholds(batch.pre, batch.features)
        norm = at(self.W_dec.norm(dim=1), batch.features)
        if self.config.penalty == "l0":
            sparsity: Tensor = _Step.apply(batch.pre, threshold, self.config.bandwidth)  # type: ignore[no-untyped-call]
        else:
            sparsity = torch.tanh(4 * batch.codes * norm)
        terms["penalty"] = self.config.weight * batch.per_token(sparsity)
        if self.config.pre_act:
            terms["pre_act"] = self.config.pre_act * batch.per_token((threshold - batch.pre).relu() * norm)
        return terms

    def _thresholds(self, pre: Tensor, features: Tensor | slice) -> Tensor:
        return at(self.log_threshold.exp(), features).expand_as(pre)


# A step has no gradient, so a threshold learns by that of the step averaged over a window of width e: with K(u) = 1
# where |u| < 1/2, d code / d threshold = -(threshold / e) K((pre - threshold) / e), and for the count the same with 1
# instead of the threshold in front. Rajamanoharan et al. 2024, section 3.


class _Jump(Function):
    """pre where it is above the threshold, else 0."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return gradient * (pre > threshold), gradient * near * -threshold / ctx.bandwidth, None


class _Step(Function):
    """1 where pre is above the threshold, else 0; pre learns nothing from it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, gradient * near / -ctx.bandwidth, None


@hookimpl
def saefw_saes() -> list[type[SaeConfig]]:
    """One: jumprelu."""
    return [JumpRelu]
