"""Learns while training which value a feature must exceed to fire.

Shapes: n tokens, s d_sae, e entries.
"""

import torch
from torch import Tensor, nn

from saefw.sparse import Entries, above, largest_of_batch


class Threshold(nn.Module):
    """Who fires in a batch of n tokens: the k n largest, if above zero (Bussmann et al., BatchTopK SAEs, 2024).

    Once trained, a token must not depend on its neighbours: what is above `value` fires, the average of the smallest
    that training batches kept. As in batch normalisation, the mode of the module says which of the two, and only in
    training it learns.
    """

    value: Tensor
    n_batches: Tensor

    def __init__(self, k: int) -> None:
        """Let `k` features a token fire, on average."""
        super().__init__()
        self.k = k
        self.register_buffer("value", torch.zeros(()))
        self.register_buffer("n_batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, pre_ns: Tensor) -> Entries:
        """Return which features are active, of pre-activations."""
        if not self.training:
            return above(pre_ns, self.value)
        entries = largest_of_batch(pre_ns, self.k)
        self._learn(entries.of(pre_ns))
        return entries

    def _learn(self, pre_e: Tensor) -> None:
        """Take in what a batch kept.

        The last tenth of the batches counts, but no more than about the last 1,000: a short run's value, too, is that
        of its end (polynomial-decay averaging with eta 9: Shamir & Zhang, Stochastic gradient descent for non-smooth
        optimization, 2013). A batch in which nothing is above zero says nothing.
        """
        if len(pre_e):
            smallest = torch.where(pre_e > 0, pre_e, torch.inf).amin().to(self.value)
            fires = smallest.isfinite()
            share = (10 / (10 + self.n_batches)).clamp(min=1e-3)
            self.value.lerp_(torch.where(fires, smallest, self.value), share.to(self.value))
            self.n_batches += fires
