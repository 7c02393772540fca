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
    image_g, feature_g, score_g = fired.image_g.numpy(), fired.feature_g.numpy(), fired.score_g.numpy()
    # Few pairs get further than this once the ranks are filled.
    pair_c = np.flatnonzero(score_g > np.ascontiguousarray(top["score_st"][:, -1])[feature_g])
    if not len(pair_c):
        return
    # By feature, falling score and image, in one number: `firing` sees to it that 63 bits hold that.
    bits = (len(example_e) - 1).bit_length()
    falling_c = 0x7FFFFFFF - score_g[pair_c].view(np.int32).astype(np.int64)
    # Torch sorts them by their digits on all cores, and tells their places along with it.
    sorted_c = torch.from_numpy((((feature_g[pair_c] << 31) | falling_c) << bits) | image_g[pair_c]).sort()
    key_c, pair_c = sorted_c.values.numpy(), pair_c[sorted_c.indices.numpy()]
    place_c = places(key_c >> (31 + bits))
    key_c, pair_c, place_c = (x[place_c < n_top] for x in (key_c, pair_c, place_c))
    feature_c, image_c = key_c >> (31 + bits), key_c & ((1 << bits) - 1)
    score_c = (0x7FFFFFFF - ((key_c >> bits) & 0x7FFFFFFF)).astype(np.int32).view(np.float32)
    rank_c = place_c + (top["score_st"][feature_c] >= score_c[:, None]).sum(axis=1)
    feature_m, image_m, score_m, pair_m, rank_m = (
        x[rank_c < n_top] for x in (feature_c, image_c, score_c, pair_c, rank_c)
    )
    first_r = opens(feature_m)
    row_s, n_r = feature_m[first_r], np.diff(first_r, append=len(feature_m))
    row_m = np.repeat(np.arange(len(row_s)), n_r)
    comes_rt = np.zeros((len(row_s), n_top), dtype=bool)
    comes_rt[row_m, rank_m] = True
    # Those that stay move up behind those that come; as many go, from the last on, and leave the room for their maps.
    order_rt = np.arange(n_top) - np.cumsum(comes_rt, axis=1)
    free_m = top["slot_st"][row_s][np.arange(n_top) >= n_top - n_r[:, None]]
    come = {
        "score_st": score_m,
        "example_st": example_e.numpy()[image_m],
        "label_st": label_e.numpy()[image_m],
        "value_st": fired.peak_g.numpy()[pair_m],
        "token_st": fired.token_g.numpy()[pair_m],
        "slot_st": free_m,
    }
    # Where one comes, it does not matter what is moved there.
    from_rt, to_m = row_s[:, None] * n_top + order_rt, row_m * n_top + rank_m
    for name, new_m in come.items():
        merged_rt = top[name].reshape(-1)[from_rt]
        merged_rt.reshape(-1)[to_m] = new_m
        top[name][row_s] = merged_rt
    # The maps of the new ones, from their codes.
    map_kp = top["map_stp"].reshape(-1, top["map_stp"].shape[2])
    slot_m = feature_m * n_top + free_m
    map_kp[slot_m] = 0
    length_m, first_m = fired.length_g.numpy()[pair_m], fired.first_g.numpy()[pair_m]
    code_n = np.arange(length_m.sum()) + np.repeat(first_m - np.cumsum(length_m) + length_m, length_m)
    value_n = fired.value_n.numpy()[code_n]
    lit_n = value_n > 0
    map_kp[np.repeat(slot_m, length_m)[lit_n], fired.token_n.numpy()[code_n][lit_n]] = value_n[lit_n]


def opens(group_n: Array) -> Array:
    """Return where each run of equal numbers, 0 or larger, begins."""
    found: Array = np.flatnonzero(np.diff(group_n, prepend=-1))
    return found


def places(group_n: Array) -> Array:
    """Return the place of each number in its run of equal ones."""
    first_r = opens(group_n)
    found: Array = np.arange(len(group_n)) - np.repeat(first_r, np.diff(first_r, append=len(group_n)))
    return found


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
