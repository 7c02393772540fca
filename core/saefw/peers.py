"""Metrics by the formulas of other projects, for published numbers.

They are taken over the whole set, also where a project takes them batch by batch. None replaces `nmse`: what each
leaves out is said beside it. As in `saefw.metrics`, e = x - x_hat, N tokens, D dimensions, all in float64.

Shapes: n tokens of a batch, d d_model.
"""

import math

import torch
from torch import Tensor

from saefw.metric import PerToken
from saefw.plugin import Codes


class Sums:
    """Sums over all tokens that the formulas below are made of."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.n, self.d = 0, 0
        self.sums = dict.fromkeys(("xx", "ee", "hh", "xh"), 0.0)
        self.x_d = self.e_d = torch.zeros((), dtype=torch.float64)

    def add(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> None:
        """Take in a batch."""
        x_nd, hat_nd = x_nd.double(), x_hat_nd.double()
        e_nd = x_nd - hat_nd
        self.n, self.d = self.n + len(x_nd), x_nd.shape[1]
        for name, product in {"xx": x_nd * x_nd, "ee": e_nd * e_nd, "hh": hat_nd * hat_nd, "xh": x_nd * hat_nd}.items():
            self.sums[name] += float(product.sum())
        self.x_d, self.e_d = self.x_d + x_nd.sum(dim=0).cpu(), self.e_d + e_nd.sum(dim=0).cpu()

    def result(self) -> float:
        """Return it; NaN where it would divide by 0."""
        above, below = self.fraction() if self.n else (0.0, 0.0)
        return above / below if below else math.nan

    def fraction(self) -> tuple[float, float]:
        """Return what is divided by what."""
        raise NotImplementedError(f"{type(self).__name__} has no fraction")


class EvSaev(Sums):
    """explained_variance of saev: 1 - Var(e) / Var(x), each over all numbers at once, whatever their dimension.

    A mean that differs between dimensions counts as variance, so it is above `explained_variance`; a constant error,
    the same in all dimensions, costs nothing.
    """

    def fraction(self) -> tuple[float, float]:
        """Return what is divided by what."""
        numbers = self.n * self.d
        x = self.sums["xx"] - float(self.x_d.sum()) ** 2 / numbers
        e = self.sums["ee"] - float(self.e_d.sum()) ** 2 / numbers
        return x - e, x


class EvSaelens(Sums):
    """explained_variance of SAELens 6 and SAEBench: 1 - E|e|^2 / (Q - (Q / D)^2), with Q = E|x|^2.

    Where the mean of each dimension was meant its square was taken, so it says little about variance.
    """

    def fraction(self) -> tuple[float, float]:
        """Return what is divided by what."""
        q, error = self.sums["xx"] / self.n, self.sums["ee"] / self.n
        below = q - (q / self.d) ** 2
        return below - error, below


class EvDictionaryLearning(Sums):
    """frac_variance_explained of dictionary_learning: 1 - sum_d Var(e_d) / sum_d Var(x_d).

    A constant error costs nothing.
    """

    def fraction(self) -> tuple[float, float]:
        """Return what is divided by what."""
        x = self.sums["xx"] - float(self.x_d.square().sum()) / self.n
        e = self.sums["ee"] - float(self.e_d.square().sum()) / self.n
        return x - e, x


class R2Overcomplete(Sums):
    """r2_score of overcomplete: 1 - mean(e^2) / mean((x - m)^2), m one mean of all numbers.

    A mean that differs between dimensions counts as variance, so it is above `explained_variance`.
    """

    def fraction(self) -> tuple[float, float]:
        """Return what is divided by what."""
        x = self.sums["xx"] - float(self.x_d.sum()) ** 2 / (self.n * self.d)
        return x - self.sums["ee"], x


class BiasSaelens(Sums):
    """relative_reconstruction_bias of SAELens and SAEBench: E|x_hat|^2 / E(x . x_hat); below 1, codes are shrunk."""

    def fraction(self) -> tuple[float, float]:
        """Return what is divided by what."""
        return self.sums["hh"], self.sums["xh"]


class NmseOpenAi(PerToken):
    """normalized_mse of OpenAI's sparse_autoencoder and of MSAE: mean over tokens of |e|^2 / |x|^2; not centred."""

    def of(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> Tensor:
        """Return that of each token [n]."""
        return (x_nd - x_hat_nd).square().sum(dim=1) / x_nd.square().sum(dim=1)


class FvuMsae(PerToken):
    """explained_variance of MSAE: mean over tokens of Var(e) / Var(x) over a token's dimensions.

    By its formula it is what is left unexplained: lower is better.
    """

    def of(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> Tensor:
        """Return that of each token [n]."""
        ratio_n: Tensor = (x_nd - x_hat_nd).var(dim=1) / x_nd.var(dim=1)
        return ratio_n


class L2RatioSaelens(PerToken):
    """l2_ratio of SAELens, SAEBench and dictionary_learning: mean over tokens of |x_hat| / |x|."""

    def of(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> Tensor:
        """Return that of each token [n]."""
        ratio_n: Tensor = x_hat_nd.norm(dim=1) / x_nd.norm(dim=1)
        return ratio_n
