"""Keeps the k largest features of each token.

Shapes: n tokens, d d_model, s d_sae, k kept, a features that count as dead.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from saefw.plugin import SaeConfig, UserError, hookimpl
from saefw.sae import Loss, Sae


class TopK(SaeConfig):
    """Keeps the k largest features of each token (Gao et al., Scaling and evaluating sparse autoencoders, 2024)."""

    use: Literal["topk"] = "topk"

    k: int = Field(32, gt=0)
    """Features that may fire on one token."""

    aux: float = Field(1 / 32, ge=0)
    """Weight of AuxK, the loss that lets dead features learn what the others leave over; 0: none."""

    k_aux: int | None = Field(None, gt=0)
    """Dead features that AuxK may use on one token; null: the largest power of two up to d_model / 2."""

    def build(self, d_model: int) -> "TopKSae":
        """Return a fresh one with these settings.

        Raises:
            UserError: there are fewer than k features.

        """
        d_sae = self.width(d_model)
        if self.k > d_sae:
            raise UserError(f"topk: k is {self.k}, but there are {d_sae} features")
        k_aux = self.k_aux or 1 << max(0, (d_model // 2).bit_length() - 1)
        return TopKSae(d_model, d_sae, self.k, self.aux, k_aux)


class TopKSae(Sae):
    """W_enc, the k largest if above zero, W_dec."""

    def __init__(self, d_model: int, d_sae: int, k: int, aux: float, k_aux: int) -> None:
        """Start from tied weights; `k` features fire on a token, up to `k_aux` dead ones are trained by `aux`."""
        super().__init__(d_model, d_sae)
        self.k, self.aux, self.k_aux = k, aux, k_aux

    def select(self, pre_ns: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices and values [n, k] of the k largest; negative ones do not fire, their value is 0."""
        top = pre_ns.topk(self.k, dim=1, sorted=False)
        return top.indices, top.values.relu()

    def loss(self, x_nd: Tensor, dead_s: Tensor) -> Loss:
        """Return the mean square error of normalised tokens and, while features are dead, AuxK."""
        pre_ns = self.pre(x_nd)
        indices_nk, values_nk = self.select(pre_ns)
        error_nd = x_nd - self.rebuild(indices_nk, values_nk)
        aux = self.auxk(pre_ns[:, dead_s], error_nd, dead_s) if self.aux and dead_s.any() else error_nd.new_zeros(())
        fired_s = torch.zeros_like(dead_s, dtype=torch.int64)
        fired_s.scatter_add_(0, indices_nk.flatten(), (values_nk > 0).long().flatten())
        return Loss({"mse": error_nd.square().mean(), "aux": self.aux * aux}, fired_s)

    def auxk(self, pre_na: Tensor, error_nd: Tensor, dead_s: Tensor) -> Tensor:
        """Return how badly the dead features rebuild the error, relative to its variance over the batch, a scalar.

        On each token the `k_aux` largest of the dead take part, and of those the ones above zero: one that is
        below zero on every token is not reached. The error is a fixed target, so the live features learn nothing
        from it; the decoder bias is no part of it and is not added. Gao et al. 2024, appendix A.2.

        Args:
            pre_na: pre-activations [n, a] of the dead features.
            error_nd: what the live features leave over, [n, d].
            dead_s: which features are dead, bool [s].

        """
        target_nd = error_nd.detach()
        if pre_na.shape[1] > self.k_aux:
            top = pre_na.topk(self.k_aux, dim=1, sorted=False)
            codes_na = torch.zeros_like(pre_na).scatter(1, top.indices, top.values.relu())
        else:
            codes_na = pre_na.relu()
        rest = (target_nd - codes_na @ self.W_dec[dead_s]).square().mean()
        variance = target_nd.var(dim=0, correction=0).mean()
        # A batch whose tokens all leave the same error has no variance to compare with.
        return torch.where(variance > 0, rest / torch.where(variance > 0, variance, 1), 0)


@hookimpl
def saefw_saes() -> list[type[SaeConfig]]:
    """One: topk."""
    return [TopK]
