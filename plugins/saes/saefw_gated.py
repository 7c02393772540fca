"""Says apart which features fire and how strongly.

Shapes: n tokens, s d_sae, e active entries.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from saefw.plugin import PenalisedConfig, SaeConfig, hookimpl
from saefw.sae import Batch, Sae, at, mean_square


class Gated(PenalisedConfig):
    """A gate that L1 keeps sparse, and magnitudes that it does not shrink (Rajamanoharan et al., 2024)."""

    use: Literal["gated"] = "gated"

    aux: float = Field(0.0, ge=0)
    """Weight of AuxK, the loss that lets dead features learn what the others leave over; 0: none."""

    l1: float = Field(1e-3, ge=0)
    """Weight of the penalty: the sum of a token's open gates, averaged over tokens.

    The errors beside it are means over tokens and dimensions, in units where the activations have mean square 1.
    """

    def build(self, d_model: int) -> "GatedSae":
        """Return a fresh one with these settings."""
        return GatedSae(d_model, self.width(d_model), self.l1, self.unit_norm)


class GatedSae(Sae):
    """W_enc twice, as a gate and with scale and bias of their own as magnitudes; W_dec.

    `W_enc` and `b_enc` are the paper's W_gate and b_gate; its W_mag is exp(r_mag) W_gate, row by row.
    """

    draws = False

    def __init__(self, d_model: int, d_sae: int, l1: float, unit_norm: bool) -> None:
        """Start from tied weights and magnitudes equal to gates; `l1` weighs the penalty on gates."""
        super().__init__(d_model, d_sae)
        self.l1, self.unit_norm = l1, unit_norm
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def fire(self, pre: Tensor, features: Tensor | slice) -> Tensor:
        """Return the magnitudes where the gate's pre-activations are above zero; they teach the gate's bias nothing."""
        magnitude = (pre - at(self.b_enc, features)) * at(self.r_mag.exp(), features) + at(self.b_mag, features)
        return magnitude.relu() * (pre > 0)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return the error, the penalty on the gates, and the error of the gates as codes.

        The last teaches gates to open where they help; the decoder learns nothing from it (Rajamanoharan et al.,
        Improving dictionary learning with gated sparse autoencoders, 2024, section 3). Where decoder rows are free, a
        gate counts by the norm of its row.
        """
        gates = batch.pre.relu()
        weighed = gates if self.unit_norm else gates * at(self.W_dec.norm(dim=1), batch.features)
        gate_error_nd = batch.x_nd - batch.rebuild(gates)
        penalty = self.l1 * batch.per_token(weighed)
        return {**super().terms(batch), "penalty": penalty, "gate": mean_square(gate_error_nd)}


@hookimpl
def saefw_saes() -> list[type[SaeConfig]]:
    """One: gated."""
    return [Gated]
