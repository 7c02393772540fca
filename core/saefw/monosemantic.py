"""Says how alike the images are on which a feature fires, in one pass.

Shapes: e images, d d_embed, s d_sae, g pairs of an image and a feature that fires on it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize


def sums(d_sae: int, d_embed: int) -> dict[str, Tensor]:
    """Return what is added up, before the first image."""
    return {
        "n": torch.zeros((), dtype=torch.int64),
        "sum_s": torch.zeros(d_sae, dtype=torch.float64),
        "squares_s": torch.zeros(d_sae, dtype=torch.float64),
        "low_s": torch.zeros(d_sae, dtype=torch.float64),
        "high_s": torch.zeros(d_sae, dtype=torch.float64),
        "embedding_d": torch.zeros(d_embed, dtype=torch.float64),
        "weighted_ds": torch.zeros(d_embed, d_sae, dtype=torch.float64),
    }


def add(sums: dict[str, Tensor], image_g: Tensor, feature_g: Tensor, score_g: Tensor, embedding_ed: Tensor) -> None:
    """Take in images: the scores of the features that fire on them, and their embeddings, not normalised."""
    unit_ed = normalize(embedding_ed.double(), dim=1)
    score_es = torch.zeros(len(unit_ed), sums["sum_s"].shape[0], dtype=torch.float64)
    score_es[image_g, feature_g] = score_g.double()
    low_s, high_s = score_es.aminmax(dim=0)
    seen = int(sums["n"])
    sums["low_s"].copy_(torch.minimum(sums["low_s"], low_s) if seen else low_s)
    sums["high_s"].copy_(torch.maximum(sums["high_s"], high_s) if seen else high_s)
    sums["n"] += len(unit_ed)
    sums["sum_s"] += score_es.sum(dim=0)
    sums["squares_s"] += score_es.square().sum(dim=0)
    sums["embedding_d"] += unit_ed.sum(dim=0)
    sums["weighted_ds"].addmm_(unit_ed.T, score_es)


def scores(sums: dict[str, Tensor]) -> np.ndarray[Any, Any]:
    """Return the monosemanticity score of each feature, float64 [s]; NaN where fewer than two images tell.

    MS = sum over i < j of a_i a_j cos(E_i, E_j) / sum over i < j of a_i a_j, with a the scores of the images scaled to
    0..1 (Pach et al., Sparse autoencoders learn monosemantic features in vision-language models, 2025). With unit rows
    E this is (|E^T a|^2 - sum a^2) / ((sum a)^2 - sum a^2), exactly; the scaling, known only at the end, is done there.
    """
    n, low_s = int(sums["n"]), sums["low_s"]
    range_s = sums["high_s"] - low_s
    total_s = (sums["sum_s"] - n * low_s) / range_s
    squares_s = (sums["squares_s"] - 2 * low_s * sums["sum_s"] + n * low_s.square()) / range_s.square()
    weighted_ds = (sums["weighted_ds"] - sums["embedding_d"][:, None] * low_s) / range_s
    pairs_s = total_s.square() - squares_s
    score_s = (weighted_ds.square().sum(dim=0) - squares_s) / pairs_s
    # One image alone leaves no pair but what rounding leaves.
    score_s[~(pairs_s > 1e-9 * squares_s)] = torch.nan
    return score_s.numpy()
