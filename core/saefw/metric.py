"""What a metric is: a number of an SAE over tokens.

Shapes: n tokens of a batch, d d_model.
"""

import math
from typing import Protocol

from torch import Tensor

from saefw.errors import UserError
from saefw.origin import whose
from saefw.sae import Codes


class Metric(Protocol):
    """A number computed for an SAE over held-out tokens, in float64."""

    def add(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> None:
        """Take in a batch: recorded tokens, their reconstruction, their codes."""
        ...

    def result(self) -> float:
        """The number over all batches."""
        ...


class PerToken:
    """Mean over tokens of a number that each has by itself."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.n, self.sum = 0, 0.0

    def of(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> Tensor:
        """Return the number of each token [n], of float64 tokens; what a metric overrides."""
        raise NotImplementedError(f"{type(self).__name__} has no of")

    def add(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> None:
        """Take in a batch.

        Raises:
            UserError: what `of` gives is not one number a token.

        """
        of_n = self.of(x_nd.double(), x_hat_nd.double(), codes)
        if of_n.shape != (len(x_nd),):
            who, got = whose(type(self)), list(of_n.shape)
            raise UserError(f"{who}: of() must give a number for each token, here [{len(x_nd)}] (got {got})")
        self.n += len(x_nd)
        self.sum += float(of_n.sum())

    def result(self) -> float:
        """Return it; NaN if some token has none."""
        return self.sum / self.n if self.n and math.isfinite(self.sum) else math.nan
