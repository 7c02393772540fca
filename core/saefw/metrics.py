"""What is measured of every SAE on held-out tokens, in float64.

N tokens x with reconstructions x_hat; the mean over those tokens, dimension by dimension, is x_bar. Sums run over all
tokens and are divided once, so that no number depends on how the tokens were cut into batches.

Shapes: n tokens of a batch, d d_model, s d_sae, k codes a token.
"""

import math

import torch
from torch import Tensor

from saefw.plugin import Codes

DENSE = 0.1
"""A feature is dense when it fires on more than this share of tokens."""


class Nmse:
    """Normalised mean square error: sum |x - x_hat|^2 / sum |x - x_bar|^2; 0 is perfect, 1 what x_bar alone reaches.

    It is the fraction of variance unexplained of sparsify (EleutherAI), over a whole set instead of a batch.
    """

    def __init__(self) -> None:
        """Start at nothing."""
        self.n, self.error = 0, 0.0
        self.sum_d = torch.zeros((), dtype=torch.float64)
        self.square = 0.0

    def add(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> None:
        """Take in a batch."""
        x_nd = x_nd.double()
        self.n += len(x_nd)
        self.error += float((x_nd - x_hat_nd.double()).square().sum())
        self.sum_d = self.sum_d.to(x_nd.device) + x_nd.sum(dim=0)
        self.square += float(x_nd.square().sum())

    def result(self) -> float:
        """Return it; NaN if all tokens were the same."""
        variance = self.square - float(self.sum_d.square().sum()) / max(self.n, 1)
        return self.error / variance if variance > 0 else math.nan


class ExplainedVariance(Nmse):
    """Share of the variance explained: 1 - nmse."""

    def result(self) -> float:
        """Return it; NaN if all tokens were the same."""
        return 1 - super().result()


class Cosine:
    """Mean over tokens of the cosine between x and x_hat, as recorded: not centred, so a large mean flatters it."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.n, self.sum = 0, 0.0

    def add(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> None:
        """Take in a batch."""
        self.n += len(x_nd)
        self.sum += float(torch.cosine_similarity(x_nd.double(), x_hat_nd.double(), dim=1).sum())

    def result(self) -> float:
        """Return it."""
        return self.sum / self.n if self.n else math.nan


class L0:
    """Mean over tokens of how many features fire."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.n, self.fired = 0, 0

    def add(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> None:
        """Take in a batch."""
        self.n += len(x_nd)
        self.fired += int((codes.values != 0).sum())

    def result(self) -> float:
        """Return it."""
        return self.fired / self.n if self.n else math.nan


class Dead:
    """Share of features that fire on none of the tokens measured; with more tokens it can only fall."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.n = 0
        self.fired_s = torch.zeros(0, dtype=torch.int64)

    def add(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> None:
        """Take in a batch."""
        self.n += len(x_nd)
        fired_s = torch.bincount(codes.indices[codes.values != 0], minlength=codes.d_sae).cpu()
        self.fired_s = fired_s + self.fired_s if len(self.fired_s) else fired_s

    def result(self) -> float:
        """Return it."""
        return float((self.fired_s == 0).double().mean())


class Dense(Dead):
    """Share of features that fire on more than a tenth of the tokens."""

    def result(self) -> float:
        """Return it."""
        return float((self.fired_s > DENSE * self.n).double().mean())
