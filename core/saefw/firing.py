"""Finds which features fire on which image, and how.

Shapes: e images, p patches, d d_model, s d_sae, n codes above zero, g pairs of an image and a feature that fires on
it; `value_n` has shape [n].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saefw.sae import Sae

ROOM = 1 << 31
"""Pairs and patches are numbered together in so many numbers at most."""


class Firing(NamedTuple):
    """Every image of a batch with every feature that fires on it, by image; of several patches then by feature."""

    image_g: Tensor
    """int64: the image, counted in the batch."""

    feature_g: Tensor
    """int64."""

    peak_g: Tensor
    """float32: the largest value over the patches; 0 where the feature fires on [CLS] alone."""

    token_g: Tensor
    """int64: the first of the patches that have it."""

    mass_g: Tensor
    """float64: the sum over the patches."""

    fires_g: Tensor
    """int64: on how many patches."""

    score_g: Tensor
    """float32: what the image counts for with this feature."""

    first_g: Tensor
    """int64: the first of the pair's codes, which lie together."""

    length_g: Tensor
    """int64: how many they are."""

    token_n: Tensor
    """int64: the patch of each code."""

    value_n: Tensor
    """float32: its value; a pair that fires on [CLS] alone, or there too, has one code of 0."""


def most_images(d_sae: int, n_patches: int) -> int:
    """Return how many images `firing` takes at once at most."""
    return ROOM // (d_sae << _bits(n_patches))


def codes(sae: Sae, x_nd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes above zero of tokens [n, d], by token: its number and the feature, int64, the value, float32."""
    if type(sae).select is Sae.select:  # it would only cut from dense codes as many as fire on the busiest token
        code_ns = sae.dense(x_nd)
        token_n, feature_n = (code_ns > 0).nonzero(as_tuple=True)
        return token_n, feature_n, code_ns[token_n, feature_n].float()
    found = sae.encode(x_nd)
    token_n, slot_n = (found.values > 0).nonzero(as_tuple=True)
    return token_n, found.indices[token_n, slot_n], found.values[token_n, slot_n].float()


def firing(sae: Sae, x_epd: Tensor, score: str = "max", cls_ed: Tensor | None = None) -> Firing:
    """Encode images and group what fires.

    Args:
        sae: encodes each token alone.
        x_epd: the patches of at most `most_images` images.
        score: what an image counts for: `max` or `sum` over its patches, or `cls`, the value on its [CLS].
        cls_ed: their [CLS], for score `cls`.

    """
    n_patches, d_model = x_epd.shape[1:]
    token_n, feature_n, value_n = codes(sae, x_epd.reshape(-1, d_model))
    if n_patches == 1 and (score != "cls" or cls_ed is None):
        return _ungrouped(token_n, feature_n, value_n)
    image_n, patch_n = token_n // n_patches, token_n % n_patches
    if score != "cls" or cls_ed is None:
        return grouped(image_n, patch_n, feature_n, value_n, sae.d_sae, n_patches, score)
    cls_es = sae.dense(cls_ed).float()
    there = (cls_es > 0).nonzero()
    # Where [CLS] fires there is a pair, if no patch of it fires too.
    image_n, feature_n = (torch.cat(both) for both in ((image_n, there[:, 0]), (feature_n, there[:, 1])))
    patch_n, value_n = (torch.cat([x, x.new_zeros(len(there))]) for x in (patch_n, value_n))
    found = grouped(image_n, patch_n, feature_n, value_n, sae.d_sae, n_patches)
    return found._replace(score_g=cls_es[found.image_g, found.feature_g])


def grouped(
    image_n: Tensor, patch_n: Tensor, feature_n: Tensor, value_n: Tensor, d_sae: int, n_patches: int, score: str = "max"
) -> Firing:
    """Group codes in any order by image and feature; values are float32 and 0 or larger."""
    bits = _bits(n_patches)
    # The bits of a positive float sort as the float does, so one int64 holds all in order: by image, feature and value,
    # of equal values the first patch last. Sorting plain numbers is many times faster than sorting places.
    key_n = ((image_n * d_sae + feature_n) << (32 + bits)) | ((1 << bits) - 1 - patch_n)
    key_n = (key_n | (value_n.view(torch.int32).long() << bits)).sort().values
    pair_n = key_n >> (32 + bits)
    value_n = (key_n >> bits).to(torch.int32).view(torch.float32)
    token_n = (1 << bits) - 1 - (key_n & ((1 << bits) - 1))
    opens_n = torch.ones_like(pair_n, dtype=torch.bool)
    opens_n[1:] = pair_n[1:] != pair_n[:-1]
    first_g = opens_n.nonzero()[:, 0]
    last_g = torch.empty_like(first_g)
    last_g[:-1], last_g[-1:] = first_g[1:] - 1, len(pair_n) - 1
    length_g, pair_g, peak_g = last_g - first_g + 1, pair_n[first_g], value_n[last_g]
    mass_g = torch.segment_reduce(value_n.double(), "sum", lengths=length_g, unsafe=True)
    fires_g = length_g - (value_n[first_g] == 0).long()
    score_g = mass_g.float() if score == "sum" else peak_g
    image_g, feature_g = pair_g // d_sae, pair_g % d_sae
    return Firing(
        image_g, feature_g, peak_g, token_n[last_g], mass_g, fires_g, score_g, first_g, length_g, token_n, value_n
    )


def _ungrouped(image_n: Tensor, feature_n: Tensor, value_n: Tensor) -> Firing:
    """Return codes by image, of one token each, as they are: each is a pair."""
    at_n, none_n, one_n = torch.arange(len(image_n), device=image_n.device), image_n * 0, torch.ones_like(image_n)
    return Firing(image_n, feature_n, value_n, none_n, value_n.double(), one_n, value_n, at_n, one_n, none_n, value_n)


def _bits(n_patches: int) -> int:
    return (n_patches - 1).bit_length()
