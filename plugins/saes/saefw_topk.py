"""Keeps the k largest features of each token.

Shapes: n tokens, d d_model, s d_sae.
"""

from typing import Literal

from torch import Tensor

from saefw.plugin import KeptConfig, SaeConfig, hookimpl
from saefw.sae import Entries, Sae, largest


class TopK(KeptConfig):
    """Keeps the k largest features of each token (Gao et al., Scaling and evaluating sparse autoencoders, 2024)."""

    use: Literal["topk"] = "topk"

    def build(self, d_model: int) -> "TopKSae":
        """Return a fresh one with these settings.

        Raises:
            UserError: there are fewer than k features.

        """
        return TopKSae(d_model, self.fitting(d_model), self.k)


class TopKSae(Sae):
    """W_enc, the k largest if above zero, W_dec."""

    by_token = nearly = True
    draws = False

    def __init__(self, d_model: int, d_sae: int, k: int) -> None:
        """Start from tied weights; `k` features fire on a token."""
        super().__init__(d_model, d_sae)
        self.k = k

    def select(self, pre_ns: Tensor) -> Entries:
        """Return the k largest of each token; negative ones do not fire."""
        return largest(pre_ns, self.k)


@hookimpl
def saefw_saes() -> list[type[SaeConfig]]:
    """One: topk."""
    return [TopK]
