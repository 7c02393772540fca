"""What is measured of every SAE on held-out tokens, in float64.

N tokens x with reconstructions x_hat; the mean over those tokens, dimension by dimension, is x_bar. Sums run over all
tokens and are divided once, so that no number depends on how the tokens were cut into batches.

Shapes: n tokens of a batch, d d_model, s d_sae, k codes a token.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saefw.metric import Metric, PerToken
from saefw.sae import Codes, Sae

DENSE = 0.1
"""A feature is dense when it fires on more than this share of tokens."""

PAIRS = 1 << 24
"""How many cosines of decoder rows are held at once."""


class Nmse:
    """Normalised mean square error: sum |x - x_hat|^2 / sum |x - x_bar|^2; 0 is perfect, 1 what x_bar alone reaches.

    It is the fraction of variance unexplained of sparsify (EleutherAI), over a whole set instead of a batch, and the
    normalized_mse of saev. Normalisation is one shift and one scale, so in normalised units it is the same number.
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


class Cosine(PerToken):
    """Mean over tokens of the cosine between x and x_hat, as recorded: not centred, so a large mean flatters it."""

    def of(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> Tensor:
        """Return the cosine of each token [n]."""
        return torch.cosine_similarity(x_nd, x_hat_nd, dim=1)


class L0:
    """Mean over tokens of how many features fire."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.tokens_k = torch.zeros(0, dtype=torch.int64)
        """On how many tokens 0, 1, 2, ... features fire."""

    def add(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> None:
        """Take in a batch."""
        n_k = torch.bincount((codes.values != 0).sum(dim=1), minlength=len(self.tokens_k)).cpu()
        n_k[: len(self.tokens_k)] += self.tokens_k
        self.tokens_k = n_k

    def result(self) -> float:
        """Return it."""
        n = int(self.tokens_k.sum())
        return int((self.tokens_k * torch.arange(len(self.tokens_k))).sum()) / n if n else math.nan


class L0Median(L0):
    """The median over tokens of how many features fire."""

    share = 0.5

    def result(self) -> float:
        """Return the smallest number that this share of the tokens does not exceed."""
        n = int(self.tokens_k.sum())
        reached = self.tokens_k.cumsum(dim=0) >= self.share * n
        return float(reached.long().argmax()) if n else math.nan


class L0P95(L0Median):
    """How many features fire at most on 95 % of the tokens."""

    share = 0.95


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

    share = DENSE

    def result(self) -> float:
        """Return it."""
        return float((self.fired_s > self.share * self.n).double().mean())


class Dense1(Dense):
    """Share of features that fire on more than a hundredth of the tokens."""

    share = 0.01


@torch.no_grad()
def measure(
    saes: Sequence[Sae], metrics: Mapping[str, type[Metric]], batches: Iterable[Tensor]
) -> list[dict[str, float]]:
    """Return the metrics of each SAE, which is put into eval mode, over recorded tokens, and n_valid_tokens."""
    rows = [{name: metric() for name, metric in metrics.items()} for _ in saes]
    n_tokens = 0
    for sae in saes:
        sae.eval()
    for x_nd in batches:
        n_tokens += len(x_nd)
        for sae, row in zip(saes, rows, strict=True):
            codes = sae.encode(x_nd)
            batch = x_nd, sae.decode(codes), codes
            if x_nd.device.type == "mps":  # has no float64
                batch = batch[0].cpu(), batch[1].cpu(), Codes(codes.indices.cpu(), codes.values.cpu(), codes.d_sae)
            for metric in row.values():
                metric.add(*batch)
    return [{**{name: metric.result() for name, metric in row.items()}, "n_valid_tokens": n_tokens} for row in rows]


@torch.no_grad()
def coherence(W_dec: Tensor) -> dict[str, float]:
    """Return the largest and the mean |cosine| of two different decoder rows [s, d]; NaN if there are none.

    Pairs are gone through block by block, so that no [s, s] is ever held. The largest is the coherence of a
    dictionary (Donoho & Huo 2001).
    """
    rows_sd = normalize(W_dec.float(), dim=1)
    n, largest, total = len(rows_sd), 0.0, 0.0
    if n < 2:
        return {"decoder_cos_max": math.nan, "decoder_cos_mean": math.nan}
    block = max(1, PAIRS // n)
    for start in range(0, n, block):
        cos_bs = (rows_sd[start : start + block] @ rows_sd[start:].T).abs().triu_(1)
        largest = max(largest, float(cos_bs.max()))
        total += float(cos_bs.sum(dim=1).cpu().double().sum())
    return {"decoder_cos_max": largest, "decoder_cos_mean": total / (n * (n - 1) / 2)}
