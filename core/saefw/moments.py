"""Mean and variance of vectors, taken in piece by piece.

Shapes: n vectors, d d_model; `x_nd` has shape [n, d].
"""

import sys

import torch
from torch import Tensor

BLOCK = 1024
"""Vectors that are summed in float32, while they are in the processor's cache; sums of blocks are added in float64."""


class Moments:
    """Count, mean and squared deviations of vectors, held in float64.

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
        """Take in vectors of any floating dtype, on the CPU.

        Each block is centred on its own mean, and what rounding left of that is put right from the deviations: so
        float32 costs a variance about 1e-7 of itself, and a mean about 1e-7 of the spread, wherever it lies.
        """
        for start in range(0, len(x_nd), BLOCK):
            block_nd = x_nd[start : start + BLOCK].float()
            near_d = block_nd.mean(0)
            off_nd = block_nd - near_d
            rest_d = off_nd.mean(0).double()
            squares_d = off_nd.square_().sum(0).double() - len(block_nd) * rest_d.square()
            norms = torch.linalg.vector_norm(block_nd, dim=1).sum(dtype=torch.float64)
            self.merge(Moments(len(block_nd), near_d.double() + rest_d, squares_d.clamp_(min=0), float(norms)))

    def merge(self, other: "Moments") -> None:
        """Take in what another has taken in."""
        n = self.n + other.n
        if other.n:
            shift_d = other.mean_d - self.mean_d
            self.mean_d = self.mean_d + shift_d * (other.n / n)
            self.squares_d = self.squares_d + other.squares_d + shift_d.square() * (self.n * other.n / n)
            self.n, self.norms = n, self.norms + other.norms

    @property
    def var_d(self) -> Tensor:
        """Mean square distance from the mean, by dimension, float64 [d]."""
        return self.squares_d / max(self.n, 1)

    @property
    def offset_ratio(self) -> float:
        """||mean|| / ||standard deviations||: how far the vectors lie from 0, in units of their spread; 0 without any.

        Infinite, where all vectors are the same, is told as the largest float, so that it stays a number.
        """
        ratio = float(self.mean_d.norm() / self.var_d.sum().sqrt()) if self.mean_d.any() else 0.0
        return min(ratio, sys.float_info.max)

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
