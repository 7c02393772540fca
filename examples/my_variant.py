"""A variant of one's own in one file: a ReLU whose penalty spares strong features.

L1 takes as much from a strong feature as from a weak one, so what fires comes out too weak. Here the pull falls with
the value, as in reweighted L1 (Candes, Wakin and Boyd, 2008). Only `terms` is its own: it
is trained as fast as the variant `relu`.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from saefw.plugin import SaeConfig, hookimpl
from saefw.sae import Batch, Sae


class Sparing(SaeConfig):
    """A ReLU with a logarithmic penalty."""

    use: Literal["sparing"] = "sparing"

    weight: float = Field(0.02, ge=0)
    """Of the penalty; on values near zero it pulls as hard as `l1` of the variant `relu`."""

    knee: float = Field(0.5, gt=0)
    """The value at which the pull has fallen by half."""

    def build(self, d_model: int) -> "SparingSae":
        """Return a fresh one with these settings."""
        return SparingSae(d_model, self.width(d_model), self.weight, self.knee)


class SparingSae(Sae):
    """W_enc, ReLU, W_dec."""

    def __init__(self, d_model: int, d_sae: int, weight: float, knee: float) -> None:
        """Start as every SAE does."""
        super().__init__(d_model, d_sae)
        self.weight, self.knee = weight, knee

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return the error, and the mean over tokens of the sum of logarithms of codes."""
        logarithms = (batch.codes / self.knee).log1p()
        return {**super().terms(batch), "penalty": self.weight * self.knee * batch.per_token(logarithms)}


@hookimpl
def saefw_saes() -> list[type[SaeConfig]]:
    """One: sparing."""
    return [Sparing]
