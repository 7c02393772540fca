"""Keeps the strongest images of each feature, with their maps.

Shapes: s d_sae, t top, p patches, g pairs of an image and a feature that fires on it, r features that change, m new
images of them, c pairs that may be among the strongest.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from saefw.firing import Firing

Array = np.ndarray[Any, Any]


def kept(d_sae: int, n_patches: int, top: int) -> dict[str, Tensor]:
    """Return what is kept of the strongest images, before the first one.

    Rows are ordered by rank; maps lie where there was room, `slot_st` says where.
    """
    return {
        "score_st": torch.zeros(d_sae, top),
        "example_st": torch.zeros(d_sae, top, dtype=torch.int64),
        "label_st": torch.full((d_sae, top), -1),
        "value_st": torch.zeros(d_sae, top),
        "token_st": torch.zeros(d_sae, top, dtype=torch.int64),
        "slot_st": torch.arange(top).repeat(d_sae, 1),
        "map_stp": torch.zeros(d_sae, top, n_patches),
    }


def add(kept: dict[str, Tensor], example_e: Tensor, label_e: Tensor, fired: Firing) -> None:
    """Merge a batch of images, whose indices are larger than those before; of equal scores the earlier image stays."""
    top = {name: tensor.numpy() for name, tensor in kept.items()}
    n_top = top["score_st"].shape[1]
    score_g, feature_g = fired.score_g.numpy(), fired.feature_g.numpy()
    # Few pairs get further than this once the ranks are filled.
    pair_c = np.flatnonzero(score_g > np.ascontiguousarray(top["score_st"][:, -1])[feature_g])
    if not len(pair_c):
        return
    # Pairs come by image, so that of equal scores the earlier one is first.
    order_c = np.lexsort((-score_g[pair_c], feature_g[pair_c]))
    pair_c = pair_c[order_c]
    row_s, first_r, n_r = np.unique(feature_g[pair_c], return_index=True, return_counts=True)
    place_c = np.arange(len(pair_c)) - np.repeat(first_r, n_r)
    row_c = np.repeat(np.arange(len(row_s)), n_r)
    row_c, place_c, pair_c = (x[place_c < n_top] for x in (row_c, place_c, pair_c))
    n_new = int(place_c.max()) + 1
    pair_rm = np.zeros((len(row_s), n_new), dtype=np.int64)
    pair_rm[row_c, place_c] = pair_c
    new_rm = np.zeros((len(row_s), n_new), dtype=np.float32)
    new_rm[row_c, place_c] = score_g[pair_c]
    both_ra = np.concatenate([top["score_st"][row_s], new_rm], axis=1)
    order_rt = np.argsort(-both_ra, axis=1, kind="stable")[:, :n_top]
    comes_rt = order_rt >= n_top
    goes_rt = np.ones((len(row_s), n_top), dtype=bool)
    stays = np.nonzero(~comes_rt)
    goes_rt[stays[0], order_rt[stays]] = False
    # As many come as go, and both are listed row by row: who comes takes the map of who goes.
    free_m = top["slot_st"][row_s][goes_rt]
    row_m, rank_m = np.nonzero(comes_rt)
    pair_m = pair_rm[row_m, order_rt[row_m, rank_m] - n_top]
    come = {
        "score_st": score_g[pair_m],
        "example_st": example_e.numpy()[fired.image_g.numpy()[pair_m]],
        "label_st": label_e.numpy()[fired.image_g.numpy()[pair_m]],
        "value_st": fired.peak_g.numpy()[pair_m],
        "token_st": fired.token_g.numpy()[pair_m],
        "slot_st": free_m,
    }
    for name, new_m in come.items():
        merged_rt = np.take_along_axis(top[name][row_s], np.where(comes_rt, 0, order_rt), axis=1)
        merged_rt[comes_rt] = new_m
        top[name][row_s] = merged_rt
    # The maps of the new ones, from their codes.
    map_kp = top["map_stp"].reshape(-1, top["map_stp"].shape[2])
    slot_m = row_s[row_m] * n_top + free_m
    map_kp[slot_m] = 0
    length_m, first_m = fired.length_g.numpy()[pair_m], fired.first_g.numpy()[pair_m]
    code_n = np.arange(length_m.sum()) + np.repeat(first_m - np.cumsum(length_m) + length_m, length_m)
    value_n = fired.value_n.numpy()[code_n]
    lit_n = value_n > 0
    map_kp[np.repeat(slot_m, length_m)[lit_n], fired.token_n.numpy()[code_n][lit_n]] = value_n[lit_n]


def rows(kept: dict[str, Tensor]) -> dict[str, Array]:
    """Return the strongest images by feature and rank: columns of `top_example`, and `label`."""
    score_st = kept["score_st"].numpy()
    feature, rank = np.nonzero(score_st > 0)
    named = ("score", "example", "label", "value", "token")
    return {"feature": feature, "rank": rank, **{name: kept[f"{name}_st"].numpy()[feature, rank] for name in named}}


def maps(kept: dict[str, Tensor], largest_s: Tensor, block: int = 1024) -> Tensor:
    """Return uint8 [s, t, p]: the values on the patches of the top images, 255 being the feature's largest."""
    made_stp = torch.empty(kept["map_stp"].shape, dtype=torch.uint8)
    scale_s = largest_s.clamp(min=torch.finfo(torch.float32).tiny)
    for first in range(0, len(made_stp), block):
        part = slice(first, first + block)
        slot_st, map_stp = kept["slot_st"][part], kept["map_stp"][part]
        map_stp = map_stp.gather(1, slot_st.unsqueeze(2).expand(map_stp.shape))
        made_stp[part] = (map_stp / scale_s[part, None, None] * 255).round().to(torch.uint8)
    return made_stp
