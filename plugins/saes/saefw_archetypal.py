"""Dictionary rows that are mixtures of training tokens, or near one.

Shapes: n tokens, s d_sae, d d_model, m candidates.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from saefw.plugin import KeptConfig, SaeConfig, hookimpl
from saefw.sae import Entries, Sae, largest

SCALED = 256
"""Tokens that decide on which scale the encoder starts."""


class Archetypal(KeptConfig):
    """TopK whose dictionary stays near the data, so that it is much the same on every seed (Fel et al., 2025)."""

    use: Literal["archetypal"] = "archetypal"

    revision: ClassVar[int] = 2

    candidates: int = Field(1024, gt=1)
    """Training tokens, a random sample, whose convex combinations the rows of the dictionary are."""

    delta: float = Field(1.0, ge=0)
    """How far a row may be from its convex combination, in the units of normalised tokens; 0: not at all."""

    def build(self, d_model: int) -> "ArchetypalSae":
        """Return a fresh one with these settings; its candidates are made up until `prepare` brings tokens.

        Raises:
            UserError: there are fewer than k features.

        """
        return ArchetypalSae(d_model, self.fitting(d_model), self)


class ArchetypalSae(Sae):
    """W_enc, the k largest if above zero, a dictionary of mixtures: RA-SAE (Fel et al., Archetypal SAE, 2025).

    `W_dec` is no parameter but what follows from those that are: mix @ points + relax, its rows brought to norm 1.
    """

    W_dec: Tensor  # type: ignore[assignment]
    points: Tensor

    by_token = nearly = True
    draws = False

    def __init__(self, d_model: int, d_sae: int, config: Archetypal) -> None:
        """Start from mixtures of two candidates each."""
        super().__init__(d_model, d_sae)
        self.k, self.delta, self.unit_norm = config.k, config.delta, config.unit_norm
        one_s, other_s = torch.randint(config.candidates, (2, d_sae))
        share_s = torch.rand(d_sae) / 2
        mix_sm = torch.zeros(d_sae, config.candidates)
        rows_s = torch.arange(d_sae)
        mix_sm[rows_s, one_s] += 1 - share_s
        mix_sm[rows_s, other_s] += share_s
        self.mix = nn.Parameter(mix_sm)
        self.relax = nn.Parameter(torch.zeros(d_sae, d_model))
        del self.W_dec
        self.register_buffer("W_dec", torch.empty(d_sae, d_model))
        self.register_buffer("points", torch.empty(config.candidates, d_model))
        self.prepare(torch.randn(config.candidates, d_model))

    @torch.no_grad()
    def prepare(self, x_nd: Tensor) -> None:
        """Take the first tokens of the sample as candidates, again from the start where it is short; tie W_enc.

        Tokens are alike, and so are the k rows that fire on one: were each to give all of it, as rows that are far from
        each other do, they would give k times as much. So W_enc is brought to the scale that rebuilds tokens best.
        """
        self.points.copy_(x_nd[torch.arange(len(self.points)) % len(x_nd)])
        self.settle()
        self.W_enc.copy_((self.W_dec / self.W_dec.square().sum(dim=1, keepdim=True)).T)
        x_nd = x_nd[:SCALED] - self.b_dec
        rebuilt_nd = self.activate(x_nd @ self.W_enc) @ self.W_dec
        self.W_enc.mul_((x_nd * rebuilt_nd).sum() / rebuilt_nd.square().sum().clamp(min=1e-12))

    def dictionary(self) -> Tensor:
        """Return W_dec [s, d] as it follows from the parameters, with a gradient to them."""
        rows_sd = self.mix @ self.points + self.relax
        return rows_sd / rows_sd.norm(dim=1, keepdim=True).clamp(min=1e-12) if self.unit_norm else rows_sd

    @torch.no_grad()
    def settle(self) -> None:
        """Make the mixtures convex again, bring what is too far off to distance `delta`, and W_dec to what follows."""
        self.mix.relu_()
        self.mix[~self.mix.any(dim=1)] = 1
        self.mix.div_(self.mix.sum(dim=1, keepdim=True))
        self.relax.mul_((self.delta / self.relax.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1))
        self.W_dec.copy_(self.dictionary())

    def select(self, pre_ns: Tensor) -> Entries:
        """Return the k largest of each token; negative ones do not fire."""
        return largest(pre_ns, self.k)


@hookimpl
def saefw_saes() -> list[type[SaeConfig]]:
    """One: archetypal."""
    return [Archetypal]
