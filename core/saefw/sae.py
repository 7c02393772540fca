"""The SAE that every variant starts from.

Shapes: n tokens, d d_model, s d_sae; `x_nd` has shape [n, d].
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag


class Codes(NamedTuple):
    """The features that fire on each token, sparse: a dense [n, s] of a large SAE does not fit in memory."""

    indices: Tensor
    """int64 [n, k]: which features; where fewer than k fire, any index with value 0."""

    values: Tensor
    """float [n, k], zero or larger, in SAE units."""

    d_sae: int
    """How many features there are."""


class Loss(NamedTuple):
    """What one batch of training says."""

    terms: dict[str, Tensor]
    """Scalars by name, coefficients included; their sum is minimised."""

    fired_s: Tensor
    """int64 [s]: on how many of the batch's tokens each feature fired; no gradient."""


def fired(codes_ns: Tensor) -> Tensor:
    """Return on how many tokens each feature is above zero, int64 [s]."""
    return (codes_ns > 0).sum(dim=0)


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
        self.W_enc = nn.Parameter(rows_sd.T.contiguous())
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
        """Return what the loss adds for codes [n, s] that are not sparse, a scalar; by default nothing."""
        return codes_ns.new_zeros(())

    def loss(self, x_nd: Tensor, dead_s: Tensor) -> Loss:
        """Return the training loss of a batch: the mean square error over tokens and dimensions, and `penalty`.

        It may draw from torch's generator, which the trainer seeds anew for every step.

        Args:
            x_nd: training tokens, already normalised.
            dead_s: bool [s], the features that have not fired for long; for terms that revive them.

        """
        codes_ns = self.activate(self.pre(x_nd))
        error_nd = x_nd - self.reconstruct(codes_ns)
        return Loss({"mse": error_nd.square().mean(), "penalty": self.penalty(codes_ns)}, fired(codes_ns))

    # What everybody uses.

    def normalise(self, x_nd: Tensor) -> Tensor:
        """Map recorded activations to SAE units: mean 0, mean square 1 over the training tokens."""
        return (x_nd - self.mean) / self.scale

    def pre(self, x_nd: Tensor) -> Tensor:
        """Return the pre-activations [n, s] of normalised tokens: (x - b_dec) W_enc + b_enc."""
        # (x - b_dec) @ W_enc, but without a gradient [n, d] that only the bias would use: a sixth of a step's work.
        return torch.addmm(self.b_enc - self.b_dec @ self.W_enc, x_nd, self.W_enc)

    def reconstruct(self, codes_ns: Tensor) -> Tensor:
        """Return the normalised reconstruction [n, d] of dense codes."""
        return codes_ns @ self.W_dec + self.b_dec

    def encode(self, x_nd: Tensor) -> Codes:
        """Return the sparse codes of recorded activations."""
        return Codes(*self.select(self.pre(self.normalise(x_nd))), self.d_sae)

    def dense(self, x_nd: Tensor) -> Tensor:
        """Return the dense codes [n, s] of recorded activations."""
        return self.activate(self.pre(self.normalise(x_nd)))

    def rebuild(self, indices_nk: Tensor, values_nk: Tensor) -> Tensor:
        """Return the normalised reconstruction [n, d] of sparse codes."""
        # A gather of decoder rows would hold [n, k, d]; the bag sums them as it reads.
        return embedding_bag(indices_nk, self.W_dec, per_sample_weights=values_nk, mode="sum") + self.b_dec

    def decode(self, codes: Codes) -> Tensor:
        """Return the reconstruction [n, d] of sparse codes, in the units of the activations."""
        return self.rebuild(codes.indices, codes.values) * self.scale + self.mean

    def forward(self, x_nd: Tensor) -> Tensor:
        """Return the reconstruction of recorded activations, in their own units."""
        return self.decode(self.encode(x_nd))
