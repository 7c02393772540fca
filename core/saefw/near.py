"""Finds the large among pre-activations by a product in bfloat16, and reckons those exactly.

Processors that multiply in bfloat16 do so three to six times as fast as in float32, and how far such a product can be
off is known: so whatever might be above an edge is looked at again, with one dot product each in float32. What is found
is what a float32 product gives, up to the order of its sums; most of that product is never reckoned.

Shapes: n tokens, d d_model, s d_sae, e entries.
"""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saefw.largest import (
    HELD,
    SAMPLED,
    bits,
    in_parts,
    kth_of_maxima,
    largest_of_rows,
    ordered,
    places_of,
    sampled,
    side_by_side,
)
from saefw.sparse import Entries, Scratch, chosen, dots, entries_at, turned

WORTH = 1 << 20
"""How many numbers W_enc has at least: by a smaller one a product in float32 takes no longer than looking twice."""

ROUNDING = 1.01 * 2.0**-7
"""How far off a number is at most that was rounded to bfloat16 twice, relative to itself."""

SUMMING = 2.0**-22
"""The same for each summand of a product that is added up in float32, in any order and with some to spare."""

SLACK = 1.001
"""For what rounding does to the norms by which all this is reckoned."""

HOT = 3 << 19
"""How many numbers of a product a thread makes at a time, so that they are still in the processor's cache when they are
looked at."""

LEAST = 256
"""Of how many tokens that product is at least, where W_enc is LARGE: it is read for each."""

AT_ONCE = 1 << 21
"""How many numbers a thread compares at a time, at most; fewer, and threads wait for each other at NumPy's calls."""

MANY = 1 / 32
"""Which share of all is looked at again, at most: with more, a product in float32 is quicker."""

LARGE = 1 << 22
"""How many numbers W_enc has at least for the processor's cache not to hold it, about."""


Floats = NDArray[np.float32]


class TooMany(Exception):
    """So many may be large that all had better be reckoned in float32."""


class Rounded(NamedTuple):
    """An encoder in bfloat16, and how far it is off."""

    W_enc: Tensor
    """[d, s]."""

    b_enc: Tensor
    """[s]."""

    norm: Tensor
    """The largest L2 norm of a feature's weights, a scalar."""

    off: Tensor
    """The largest L2 distance of a feature's weights from the rounded ones, a scalar."""

    b_off: Tensor
    """The same of a bias, and twice what adding it may be off by rounding, a scalar."""


class Near:
    """Pre-activations [n, s] that are known nearly; `largest`, `largest_of_batch` and `above` find what is exact.

    The product is made for some tokens at a time, each time something is looked for: where W_enc is not LARGE, for so
    few that what is looked through is still in the processor's cache.
    """

    def __init__(self, z_nd: Tensor, W_enc: Tensor, b_enc: Tensor, encoder: Rounded, scratch: Scratch) -> None:
        """Reckon how far off a product will be.

        Args:
            z_nd: what the encoder sees, float32.
            W_enc: float32 [d, s].
            b_enc: float32 [s].
            encoder: the two, rounded.
            scratch: memory for a product of some tokens.

        """
        self.z_nd, self.W_enc, self.b_enc, self._encoder, self._scratch = z_nd, W_enc, b_enc, encoder, scratch
        self._near_nd = z_nd.bfloat16()
        norm_n, off_n = self._near_nd.float().norm(dim=1), (z_nd - self._near_nd).norm(dim=1)
        summed_n = SUMMING * z_nd.shape[1] * norm_n * encoder.norm
        self.off_n = SLACK * (off_n * encoder.norm + norm_n * encoder.off + summed_n + encoder.b_off)
        """How far each token's may be off, beside ROUNDING of themselves."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.z_nd)

    def first(self, n: int) -> Tensor:
        """Return those of the first n tokens, in bfloat16."""
        return self.product(self._near_nd[:n])

    def above(self, edge: Tensor | float) -> Entries:
        """Return the entries larger than an edge: a number, or one of each feature [s].

        Raises:
            TooMany: see there; this and the others.

        """
        edge_1s = torch.as_tensor(edge, dtype=torch.float32).detach().view(1, -1)
        alike, over_1s = edge_1s.numel() == 1, edge_1s.numpy()
        found = self._candidates(lambda near_ns, _: over_1s.repeat(len(near_ns), axis=0) if alike else over_1s)
        assert found.known_e is not None
        return self._only(found, found.known_e > (float(edge) if alike else edge_1s[0, found.features_e.long()]))

    def largest(self, k: int) -> Entries:
        """Return each token's k largest; of equal ones no more than that."""

        def least(near_ns: Tensor, off_n: Floats) -> Floats:
            kth_n = kth_of_maxima(near_ns, k)
            # As many as k are at least so large.
            edge: Floats = np.subtract(kth_n - off_n, np.abs(kth_n) * np.float32(ROUNDING), dtype=np.float32)
            return edge[:, None]

        found = self._candidates(least)
        assert found.known_e is not None
        starts_n = found.starts_r.long()
        counts_n = starts_n.diff()
        most = int(counts_n.max())
        if int(counts_n.min()) < k or most > max(k, MANY * self.W_enc.shape[1]):
            raise TooMany  # of numbers that are none, or of one token
        among_nm = side_by_side(found.known_e.numpy(), starts_n.numpy())
        found_nk, known_nk = largest_of_rows(torch.from_numpy(among_nm), k)
        indices_nk = found.features_e.long()[starts_n[:-1, None] + found_nk]
        return chosen(indices_nk)._replace(source=self, known_e=known_nk.flatten())

    def largest_of_batch(self, k: int) -> Entries:
        """Return the k n largest of all n tokens together; of equal ones no more than that."""
        few_nd = self._near_nd[:: max(1, len(self) // SAMPLED)]
        m, edge = k * len(self), sampled(self.product(few_nd), k * len(few_nd))
        found = self._candidates(lambda near_ns, _: np.full((len(near_ns), 1), edge, dtype=np.float32))
        assert found.known_e is not None
        if int((found.known_e > edge).sum()) < m:
            raise TooMany  # few rows told too high an edge
        kept_e = torch.zeros(len(found.known_e), dtype=torch.bool)
        return self._only(found, kept_e.index_fill_(0, largest_of_rows(found.known_e[None], m)[0].flatten(), True))

    def at(self, entries: Entries) -> Tensor:
        """Return the exact values [e] at any entries."""
        W_sd, features_e = self.W_enc.T, entries.features_e
        if W_sd.numel() < LARGE:
            return dots(self.z_nd, W_sd, entries.starts_r, features_e) + self.b_enc[features_e.long()]
        # Feature by feature, as the tokens fit the processor's cache and W_enc does not.
        order_e, starts_s, rows_e, _ = turned(entries, len(W_sd))
        known_e = torch.empty(len(features_e)).index_put_((order_e,), dots(W_sd, self.z_nd, starts_s, rows_e))
        return known_e.add_(self.b_enc[features_e.long()])

    def _only(self, found: Entries, kept_e: Tensor) -> Entries:
        """Return some of the entries."""
        assert found.known_e is not None
        before_e = torch.nn.functional.pad(kept_e.cumsum(dim=0, dtype=torch.int32), (1, 0))
        starts_r = before_e[found.starts_r.long()]
        return found._replace(starts_r=starts_r, features_e=found.features_e[kept_e], known_e=found.known_e[kept_e])

    def product(self, near_nd: Tensor) -> Tensor:
        """Return pre-activations in bfloat16 of rounded tokens, in memory that the next call uses again."""
        into_ns = self._scratch.empty(len(near_nd), self.W_enc.shape[1], torch.bfloat16, near_nd.device)
        return torch.addmm(self._encoder.b_enc, near_nd, self._encoder.W_enc, out=into_ns)

    def _candidates(self, edge: Callable[[Tensor, Floats], Floats]) -> Entries:
        """Return the entries that may reach an edge, and all that do, with their exact values.

        Args:
            edge: gives it, [n, 1] or [1, s], for some tokens: of their product, and of how far off each may be.

        """
        n, s, off_n = len(self), self.W_enc.shape[1], self.off_n.numpy()
        # Of the whole batch: on how many tokens are looked at together, nothing may hang.
        most_1 = off_n.max(initial=0, keepdims=True)
        found: list[NDArray[np.int64]] = []
        least = LEAST if self.W_enc.numel() >= LARGE else 1
        n_parts = max(1, math.ceil(n / max(least, HOT * torch.get_num_threads() // s)))
        start = 0
        for near_nd in torch.split(self._near_nd, max(1, math.ceil(n / n_parts))):
            near_ns, stop = self.product(near_nd), start + near_nd.shape[0]
            with np.errstate(invalid="ignore", over="ignore"):  # numbers that are none lead to TooMany
                over = edge(near_ns, off_n[start:stop])
                off = off_n[start:stop] if over.shape[1] == 1 else most_1
                found.extend(places + start * s for places in _reaching(near_ns, over - off[:, None]))
            if sum(map(len, found)) > MANY * n * s:
                raise TooMany
            start = stop
        entries = entries_at(torch.from_numpy(np.concatenate(found)), n, s)
        return entries._replace(source=self, known_e=self.at(entries))


def _reaching(near_ns: Tensor, least: Floats) -> list[NDArray[np.int64]]:
    """Return, part by part, the places among [n, s] of what reaches `least`, [n, 1] or [1, s], or may by rounding."""
    # A few numbers a token are reckoned by NumPy: of torch, each call gives other threads a turn and waits for one.
    (n, s), bits_ns = near_ns.shape, bits(near_ns)
    if not np.isfinite(least).all():
        raise TooMany
    # What is off by ROUNDING of itself at most reaches `least` from here on.
    floor = _floor(least / (1 + np.copysign(np.float32(ROUNDING), least)))

    def find(start: int, stop: int) -> NDArray[np.int64]:
        rows, over = bits_ns[start:stop], floor if len(floor) == 1 else floor[start:stop]
        if (over >= 0).all():  # the bits of positive numbers are in their order, and those of negative ones below
            found = rows >= over
        elif (over < 0).all():  # unsigned, those of negative ones are above, the nearer to zero the lower
            found = rows.view(np.uint16) <= ordered(over).view(np.uint16)
        else:
            found = ordered(rows) >= over
        return places_of(found) + start * s

    return in_parts(find, n, s, AT_ONCE)


def rounded(W_enc: Tensor, b_enc: Tensor) -> Rounded:
    """Round an encoder [d, s] and [s]; it is read fastest where it lies feature by feature."""
    W_sd = W_enc.T
    near_sd, norm, off = W_sd.bfloat16(), W_sd.new_zeros(()), W_sd.new_zeros(())
    # Few at a time, so that they are read from memory once.
    n_rows = max(1, HELD // W_sd.shape[1])
    for rows, near in zip(torch.split(W_sd, n_rows), torch.split(near_sd, n_rows), strict=True):
        norm = torch.maximum(norm, torch.linalg.vector_norm(rows, dim=1).max())
        off = torch.maximum(off, torch.linalg.vector_norm(rows - near, dim=1).max())
    b_near = b_enc.bfloat16()
    b_off = (b_enc - b_near).abs().max() + ROUNDING * b_enc.abs().max()
    return Rounded(near_sd.T, b_near, norm + off, off, b_off)


def _floor(x: Floats) -> NDArray[np.int16]:
    """Return the largest bfloat16 that are no larger, as integers in their order."""
    # Cut off, a number below zero becomes larger; and there are two zeros.
    cut = (x.view(np.int32) >> 16).astype(np.int16)
    found: NDArray[np.int16] = ordered(cut) - (x <= 0)
    return found


@cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16 itself."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"})
