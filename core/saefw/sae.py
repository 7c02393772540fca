"""The SAE that every variant starts from.

Shapes: n tokens, d d_model, s d_sae; `x_nd` has shape [n, d].
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Codes(NamedTuple):
    """The features that fire on each token, sparse: a dense [n, s] of a large SAE does not fit in memory."""

    indices: Tensor
    """int64 [n, k]: which features; where fewer than k fire, any index with value 0."""

    values: Tensor
    """float [n, k], zero or larger, in SAE units."""

    d_sae: int
    """How many features there are."""


class Sae(nn.Module):
    """A sparse autoencoder: normalise, W_enc, select, W_dec.

    Inputs and reconstructions are in the units of the recorded activations; `mean` and `scale` (of the training
    tokens) are inside, so nothing outside ever normalises. A variant overrides `select` (sparse, fast) or `activate`
    (dense, plain), and `penalty` where it has one; more only where its method needs it.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, d_model: int, d_sae: int) -> None:
        """Draw unit decoder rows from torch's global generator; W_enc starts as W_dec transposed, biases at zero."""
        super().__init__()
        self.d_model, self.d_sae = d_model, d_sae
        rows_sd = torch.randn(d_sae, d_model)
        rows_sd = rows_sd / rows_sd.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(rows_sd.T.clone())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(rows_sd.clone())
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(()))

    # What a variant overrides.

    def select(self, pre_ns: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices and values, both [n, k], of the features that fire; by default read off `activate`."""
        codes_ns = self.activate(pre_ns)
        k = max(1, int((codes_ns > 0).sum(dim=1).max())) if len(codes_ns) else 1
        top = codes_ns.topk(k, dim=1)
        return top.indices, top.values

    def activate(self, pre_ns: Tensor) -> Tensor:
        """Return the dense codes [n, s]; by default `select`, scattered."""
        if type(self).select is Sae.select:
            raise TypeError(f"{type(self).__name__} overrides neither select nor activate")
        indices, values = self.select(pre_ns)
        return torch.zeros_like(pre_ns).scatter(1, indices, values)

    def penalty(self, codes_ns: Tensor) -> Tensor:
        """Return what the loss adds for codes that are not sparse, a scalar; by default nothing."""
        return codes_ns.new_zeros(())

    def loss(self, x_nd: Tensor, dead_s: Tensor) -> dict[str, Tensor]:
        """Return the terms of the training loss, by name; their sum is minimised.

        Args:
            x_nd: training tokens, already normalised.
            dead_s: bool [s], the features that have not fired for long; for revival terms.

        """
        codes_ns = self.activate(self.pre(x_nd))
        error_nd = x_nd - self.reconstruct(codes_ns)
        return {"mse": error_nd.square().mean(), "penalty": self.penalty(codes_ns)}

    # What everybody uses.

    def normalise(self, x_nd: Tensor) -> Tensor:
        """Map recorded activations to SAE units: mean 0, mean square 1 over the training tokens."""
        return (x_nd - self.mean) / self.scale

    def pre(self, x_nd: Tensor) -> Tensor:
        """Return the pre-activations [n, s] of normalised tokens."""
        return (x_nd - self.b_dec) @ self.W_enc + self.b_enc

    def reconstruct(self, codes_ns: Tensor) -> Tensor:
        """Return the normalised reconstruction [n, d] of dense codes."""
        return codes_ns @ self.W_dec + self.b_dec

    def encode(self, x_nd: Tensor) -> Codes:
        """Return the sparse codes of recorded activations."""
        return Codes(*self.select(self.pre(self.normalise(x_nd))), self.d_sae)

    def dense(self, x_nd: Tensor) -> Tensor:
        """Return the dense codes [n, s] of recorded activations."""
        return self.activate(self.pre(self.normalise(x_nd)))

    def decode(self, codes: Codes) -> Tensor:
        """Return the reconstruction [n, d] of sparse codes, in the units of the activations."""
        x_nd = torch.einsum("nk,nkd->nd", codes.values, self.W_dec[codes.indices]) + self.b_dec
        return x_nd * self.scale + self.mean

    def forward(self, x_nd: Tensor) -> Tensor:
        """Return the reconstruction of recorded activations, in their own units."""
        return self.reconstruct(self.dense(x_nd)) * self.scale + self.mean
