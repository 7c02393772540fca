"""Keeps the largest features of a whole batch, as many as make k a token.

Shapes: n tokens, s d_sae.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from saefw.plugin import KeptConfig, SaeConfig, hookimpl
from saefw.sae import Entries, Sae, Threshold


class BatchTopK(KeptConfig):
    """Keeps the k n largest features of a batch of n tokens (Bussmann et al., BatchTopK sparse autoencoders, 2024)."""

    use: Literal["batchtopk"] = "batchtopk"

    k: int = Field(32, gt=0)
    """Features that fire on a token, on average; a hard token may have more, an easy one fewer."""

    def build(self, d_model: int) -> "BatchTopKSae":
        """Return a fresh one with these settings.

        Raises:
            UserError: there are fewer than k features.

        """
        return BatchTopKSae(d_model, self.fitting(d_model), self.k)


class BatchTopKSae(Sae):
    """W_enc, the k n largest of n tokens if above zero, W_dec; once trained, what is above a learnt threshold."""

    nearly = True
    draws = False

    def __init__(self, d_model: int, d_sae: int, k: int) -> None:
        """Start from tied weights; `k` features fire on a token, on average."""
        super().__init__(d_model, d_sae)
        self.threshold = Threshold(k)

    def select(self, pre_ns: Tensor) -> Entries:
        """Return which features are active."""
        entries: Entries = self.threshold(pre_ns)
        return entries


@hookimpl
def saefw_saes() -> list[type[SaeConfig]]:
    """One: batchtopk."""
    return [BatchTopK]
