"""Dictionaries within dictionaries: every prefix of the features has to rebuild the token alone.

Shapes: n tokens, s d_sae.
"""

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from saefw.plugin import KeptConfig, SaeConfig, UserError, hookimpl
from saefw.sae import Entries, Sae, Threshold, largest


class Matryoshka(KeptConfig):
    """Prefixes that rebuild alone (Bussmann et al., Learning multi-level features with Matryoshka SAEs, 2025)."""

    use: Literal["matryoshka"] = "matryoshka"

    k: int = Field(32, gt=0)
    """Features of the whole that fire on a token."""

    keep: Literal["batchtopk", "topk"] = "batchtopk"
    """Whether k is meant on average over a batch, or for each token."""

    prefixes: list[Annotated[float, Field(gt=0, lt=1)]] = Field([1 / 16, 1 / 8, 1 / 4, 1 / 2])
    """Shares of the features that rebuild alone, each larger than the one before; the whole always does."""

    sampled: bool = False
    """Draw as many prefixes anew for every step, each share from all of 0..1, instead of those above."""

    def build(self, d_model: int) -> "MatryoshkaSae":
        """Return a fresh one with these settings.

        Raises:
            UserError: there are fewer than k features, or the prefixes do not grow.

        """
        d_sae = self.fitting(d_model)
        ends = [*(round(share * d_sae) for share in self.prefixes), d_sae]
        if any(stop <= start for start, stop in pairwise([0, *ends])):
            raise UserError(
                f"matryoshka: prefixes {self.prefixes} of {d_sae} features end at {ends[:-1]}; each must be larger "
                f"than the one before, hold a feature and leave one"
            )
        return MatryoshkaSae(d_model, d_sae, self, ends)


class MatryoshkaSae(Sae):
    """W_enc, the largest, W_dec; trained on the whole and on its prefixes."""

    nearly = True

    def __init__(self, d_model: int, d_sae: int, config: Matryoshka, ends: list[int]) -> None:
        """Start from tied weights; `ends` says where each prefix ends, and d_sae."""
        super().__init__(d_model, d_sae)
        self.k, self.sampled, self.ends = config.k, config.sampled, ends
        self.threshold = Threshold(config.k) if config.keep == "batchtopk" else None
        self.by_token = self.threshold is None
        if type(self) is MatryoshkaSae:
            self.draws = config.sampled

    def select(self, pre_ns: Tensor) -> Entries:
        """Return which features of the whole are active."""
        if self.threshold is None:
            return largest(pre_ns, self.k)
        entries: Entries = self.threshold(pre_ns)
        return entries

    def prefixes(self) -> list[int]:
        """Return where the prefixes of this step end, the whole last.

        The loss is the mean of theirs, where Bussmann et al. 2025 take the sum: so without inner prefixes it is that
        of the plain SAE.
        """
        if not self.sampled:
            return self.ends
        inner = torch.randperm(self.d_sae - 1)[: len(self.ends) - 1] + 1
        return [*sorted(inner.tolist()), self.d_sae]


@hookimpl
def saefw_saes() -> list[type[SaeConfig]]:
    """One: matryoshka."""
    return [Matryoshka]
