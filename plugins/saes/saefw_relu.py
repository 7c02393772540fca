"""The plain sparse autoencoder: a ReLU and an L1 penalty.

Shapes: n tokens, d d_model, s d_sae.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from saefw.plugin import PenalisedConfig, SaeConfig, hookimpl
from saefw.sae import Sae


class Relu(PenalisedConfig):
    """A ReLU and an L1 penalty (Bricken et al., Towards Monosemanticity, 2023)."""

    use: Literal["relu"] = "relu"

    l1: float = Field(1e-3, ge=0)
    """Weight of the penalty: the sum of a token's codes, averaged over tokens.

    The error beside it is the mean over tokens and dimensions, in units where the activations have mean square 1.
    Others sum the error over dimensions: their coefficient is this one times d_model.
    """

    def build(self, d_model: int) -> "ReluSae":
        """Return a fresh one with these settings."""
        return ReluSae(d_model, self.width(d_model), self.l1, self.unit_norm)


class ReluSae(Sae):
    """W_enc, ReLU, W_dec."""

    def __init__(self, d_model: int, d_sae: int, l1: float, unit_norm: bool) -> None:
        """Start from tied weights; `l1` weighs the penalty, `unit_norm` says that decoder rows stay at norm 1."""
        super().__init__(d_model, d_sae)
        self.l1, self.unit_norm = l1, unit_norm

    def activate(self, pre_ns: Tensor) -> Tensor:
        """Return what is above zero, [n, s]."""
        return pre_ns.relu()

    def penalty(self, codes_ns: Tensor) -> Tensor:
        """Return `l1` times the mean over tokens of the sum of codes [n, s].

        Free decoder rows could grow and let the codes shrink; each code then counts by the norm of its row.
        """
        sum_s = codes_ns.mean(dim=0)
        return self.l1 * (sum_s.sum() if self.unit_norm else sum_s @ self.W_dec.norm(dim=1))


@hookimpl
def saefw_saes() -> list[type[SaeConfig]]:
    """One: relu."""
    return [Relu]
