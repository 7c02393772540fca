"""Mean and variance of vectors, taken in piece by piece in float64.

Shapes: n vectors, d d_model; `x_nd` has shape [n, d].
"""

import torch
from torch import Tensor


class Moments:
    """Count, mean and squared deviations of vectors, taken in piece by piece in float64.

    Pieces are merged as in Chan, Golub & LeVeque 1979, so that a mean far from 0 costs no digits.
    """

    def __init__(self, n: int, mean_d: Tensor, squares_d: Tensor, norms: float) -> None:
        """Start from given moments; `norms` is the sum of the vectors' L2 norms."""
        self.n, self.mean_d, self.squares_d, self.norms = n, mean_d, squares_d, norms

    @classmethod
    def none(cls, d_model: int) -> "Moments":
        """Return those of no vectors."""
        zeros_d = torch.zeros(d_model, dtype=torch.float64)
        return cls(0, zeros_d, zeros_d.clone(), 0.0)

    def add(self, x_nd: Tensor) -> None:
        """Take in vectors of any floating dtype."""
        if len(x_nd):
            x_nd = x_nd.double()
            mean_d = x_nd.mean(0)
            squares_d = (x_nd - mean_d).square().sum(0)
            self.merge(Moments(len(x_nd), mean_d, squares_d, float(x_nd.norm(dim=1).sum())))

    def merge(self, other: "Moments") -> None:
        """Take in what another has taken in."""
        n = self.n + other.n
        if other.n:
            shift_d = other.mean_d - self.mean_d
            self.mean_d = self.mean_d + shift_d * (other.n / n)
            self.squares_d = self.squares_d + other.squares_d + shift_d.square() * (self.n * other.n / n)
            self.n, self.norms = n, self.norms + other.norms

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it as tensors, to store."""
        return {
            "n": torch.tensor(self.n),
            "mean": self.mean_d,
            "squares": self.squares_d,
            "norms": torch.tensor(self.norms, dtype=torch.float64),
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Moments":
        """Return what `tensors` gave."""
        return cls(int(tensors["n"]), tensors["mean"], tensors["squares"], float(tensors["norms"]))
