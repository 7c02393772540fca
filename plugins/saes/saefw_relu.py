"""The plain sparse autoencoder: a ReLU and an L1 penalty.

Shapes: n tokens, d d_model, s d_sae, e entries that fire.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from saefw.plugin import PenalisedConfig, SaeConfig, hookimpl
from saefw.sae import Batch, Sae, at


class Relu(PenalisedConfig):
    """A ReLU and an L1 penalty (Bricken et al., Towards Monosemanticity, 2023)."""

    use: Literal["relu"] = "relu"

    aux: float = Field(0.0, ge=0)
    """Weight of AuxK, the loss that lets dead features learn what the others leave over; 0: none."""

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

    draws = False

    def __init__(self, d_model: int, d_sae: int, l1: float, unit_norm: bool) -> None:
        """Start from tied weights; `l1` weighs the penalty, `unit_norm` says that decoder rows stay at norm 1."""
        super().__init__(d_model, d_sae)
        self.l1, self.unit_norm = l1, unit_norm

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return the error and the penalty: `l1` times the sum of a token's codes, averaged over tokens.

        Free decoder rows could grow and let the codes shrink; each code then counts by the norm of its row.
        """
        codes = batch.codes if self.unit_norm else batch.codes * at(self.W_dec.norm(dim=1), batch.features)
        return {**super().terms(batch), "penalty": self.l1 * batch.per_token(codes)}


@hookimpl
def saefw_saes() -> list[type[SaeConfig]]:
    """One: relu."""
    return [Relu]
