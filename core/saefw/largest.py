"""The largest entries of each row of a matrix, exactly, by reading the matrix once.

NumPy partitions with vector instructions, which torch does not.

Shapes: r rows, s entries of a row, k the largest of them, b blocks of a row, j entries of a block.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

T = TypeVar("T")

BLOCK, APART = 16, 64
"""Of how many entries the maximum is taken before the largest are looked for, and how far apart they lie in a row,
where that divides it: near enough to be read together, and with as many others between as are compared at once."""

SAMPLED, SPARE = 64, 1.5
"""How many rows tell where the largest of a matrix begin, and how many times as many are then looked at."""

HELD, PIECE = 1 << 18, 1 << 22
"""How many numbers fit a core's cache, about; and how many a thread takes at a time where it does much with them: with
fewer, threads wait for each other at each of NumPy's calls."""


def largest_of_rows(x_rs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return indices, int64, and values [r, k] of the k largest of each row, in any order; of equal ones no more."""
    r, s = x_rs.shape
    if x_rs.device.type != "cpu" or not 0 < k < s:
        values_rk, indices_rk = x_rs.topk(k, dim=1, sorted=False)
        return indices_rk, values_rk
    x_rs, halved = x_rs.detach().contiguous(), x_rs.dtype == torch.bfloat16
    numbers, in_order = (bits, ordered) if halved else (_numbers, np.asarray)
    numbers_rs, apart = numbers(x_rs), _apart(s, k)
    maxima_rb = _maxima(x_rs, apart) if apart else in_order(numbers_rs)

    def find(start: int, stop: int) -> tuple[Array, Array]:
        rows = numbers_rs[start:stop]
        firsts = np.arange(0, rows.size, s)[:, None]
        found = _indices(maxima_rb[start:stop], k)
        if found is not None and apart:
            few = (np.take_along_axis(maxima_rb[start:stop], found, axis=1) < 0).any(axis=1) if halved else None
            # The k blocks with the largest maxima hold the k largest: what lies elsewhere has k at least as large.
            begins = found // apart * (BLOCK * apart) + found % apart
            places = begins[:, None] + (firsts[:, None] + np.arange(0, BLOCK * apart, apart)[:, None])
            among = _indices(in_order(rows.reshape(-1).take(places.reshape(len(rows), BLOCK * k))), k)
            found = None if among is None else among // k * apart + np.take_along_axis(begins, among % k, axis=1)
            if found is not None and few is not None and few.any():
                # Of what is below zero the bits do not tell the largest.
                found[few] = _indices(in_order(rows[few]), k)
        if found is None:  # some are no numbers
            found = x_rs[start:stop].topk(k, dim=1, sorted=False).indices.numpy()
        return found, rows.reshape(-1).take(found + firsts)

    parts = in_parts(find, r, s, PIECE)
    indices_rk, values_rk = (torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True))
    return indices_rk, values_rk.view(torch.bfloat16) if halved else values_rk.to(x_rs.dtype)


def kth_of_maxima(x_rs: Tensor, k: int) -> NDArray[np.float32]:
    """Return for each row of bfloat16 a number [r] that k of its entries reach, and few others; NaN: none was found."""
    r, s = x_rs.shape
    apart = _apart(s, k)
    maxima_rb = _maxima(x_rs, apart) if apart else ordered(bits(x_rs))

    def find(start: int, stop: int) -> Array:
        found: Array = np.partition(maxima_rb[start:stop], -k, axis=1)[:, -k]
        return found

    kth_r = np.concatenate(in_parts(find, r, s, PIECE))
    found_r = ((kth_r if apart else ordered(kth_r)).astype(np.int32) << 16).view(np.float32)
    if apart:
        found_r[kth_r < 0] = np.nan
    return found_r


def _apart(s: int, k: int) -> int:
    """Return how far apart the entries of a block lie in rows of s; 0, where blocks are not worth while."""
    n_blocks = s // BLOCK if not s % BLOCK and 2 * k * BLOCK <= s else 0
    return n_blocks if n_blocks % APART else min(n_blocks, APART)


def _maxima(x_rs: Tensor, apart: int) -> Array:
    """Return the maxima of the blocks of each row; of bfloat16 their bits, below zero those of any entry.

    As integers they are compared three times as fast, and above zero in the same order.
    """
    r, s = x_rs.shape
    x_rs = x_rs.view(torch.int16) if x_rs.dtype == torch.bfloat16 else x_rs
    return _numbers(x_rs.view(r, s // (BLOCK * apart), BLOCK, apart).amax(dim=2)).reshape(r, s // BLOCK)


def largest_of_all(x_rs: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return where the m largest of a whole matrix are, int64, rising, and their values; of equal ones no more.

    The places are those in the flattened matrix.
    """
    if x_rs.device.type == "cpu" and 0 < m < x_rs.numel():
        places_e, values_e = places_above(x_rs, sampled(x_rs, m))
        if len(values_e) >= m:
            kept = largest_of_rows(values_e[None], m)[0].flatten().sort().values
            return places_e[kept], values_e[kept]
    found, values = largest_of_rows(x_rs.reshape(1, -1), m)
    places_e, order_e = found.flatten().sort()
    return places_e, values.flatten()[order_e]


def sampled(x_rs: Tensor, m: int) -> float:
    """Return an edge above which a little more than m of a matrix are, probably: so few rows tell."""
    sample = x_rs[:: max(1, len(x_rs) // SAMPLED)].flatten()
    wanted = min(len(sample), math.ceil(SPARE * m * len(sample) / x_rs.numel()))
    return float(-np.partition(-_numbers(sample), wanted - 1)[wanted - 1])


def places_above(x_rs: Tensor, edge: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return where a matrix is larger than an edge, a number or one of each column [s]; int64, rising, and the values.

    The places are those in the flattened matrix.
    """
    if x_rs.device.type != "cpu":
        places_e = (x_rs > edge).flatten().nonzero().flatten()
        return places_e, x_rs.reshape(-1)[places_e]
    r, s = x_rs.shape
    numbers_rs, over = _numbers(x_rs), _numbers(edge) if isinstance(edge, Tensor) else edge

    def find(start: int, stop: int) -> tuple[Array, Array]:
        rows = numbers_rs[start:stop]
        found = places_of(rows > over)
        return found + start * s, rows.reshape(-1)[found]

    found = in_parts(find, r, s, HELD)
    places_e, values_e = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True))
    return places_e, values_e.to(x_rs.dtype)


def places_of(found: Array) -> NDArray[np.int64]:
    """Return where a flattened mask holds, rising, as `np.flatnonzero`: in half the time where that is seldom."""
    eights = np.packbits(found)
    (some,) = (eights != 0).nonzero()
    (within,) = np.unpackbits(eights.take(some)).view(bool).nonzero()
    places: NDArray[np.int64] = (some.take(within >> 3) << 3) + (within & 7)
    return places


def _indices(rows: Array, k: int) -> Array | None:
    """Return the indices [r, k] of the k largest of each row; of equal ones the first. None: some are no numbers."""
    r, s = rows.shape
    if rows.dtype == np.int16 and s < 1 << 16:
        # Of bfloat16 many are equal: with their places in the lower half, none are.
        keys = (rows.astype(np.int32) << 16) | np.arange(s, 0, -1, dtype=np.int32)
        places: Array = s - (np.partition(keys, s - k, axis=1)[:, s - k :] & 0xFFFF).astype(np.int64)
        return places
    kth = np.partition(rows, s - k, axis=1)[:, s - k, None]
    found = rows >= kth
    places = np.flatnonzero(found)
    if len(places) > r * k:
        # Of what is equal to the k-th, the first.
        tied = np.flatnonzero(np.count_nonzero(found, axis=1) > k)
        equal, above = rows[tied] == kth[tied], rows[tied] > kth[tied]
        wanted = k - np.count_nonzero(above, axis=1)
        found[tied] = above | equal & (equal.cumsum(axis=1, dtype=np.int32) <= wanted[:, None])
        places = np.flatnonzero(found)
    if len(places) == r * k:
        indices: Array = places.reshape(-1, k) - np.arange(0, rows.size, s)[:, None]
        if (indices[:, 0] >= 0).all() and (indices[:, -1] < s).all():
            return indices
    return None


def bits(x: Tensor) -> Array:
    """Return bfloat16 as the integers that its bits are."""
    bits: Array = (x.detach() if x.requires_grad else x).view(torch.int16).numpy()
    return bits


def ordered(bits: Array) -> Array:
    """Return bits of bfloat16 as integers in the order of what they stand for: those below zero are turned round."""
    turned: Array = bits ^ (bits >> 15 & 0x7FFF)
    return turned


def _numbers(x: Tensor) -> Array:
    """Return what NumPy computes with: it has no type for bfloat16."""
    known = x if x.dtype in (torch.float32, torch.float64, torch.int16) else x.float()
    numbers: Array = (known.detach() if known.requires_grad else known).numpy()
    return numbers


def in_parts(find: Callable[[int, int], T], r: int, s: int, at_most: int) -> list[T]:
    """Return what is found in the rows from one to another, few at a time, and on all cores."""
    n_threads = torch.get_num_threads()
    n_parts = r * s // at_most + 1
    at_once = max(1, -(-r // (-(-n_parts // n_threads) * n_threads if n_parts > 1 else 1)))
    starts = range(0, r, at_once) or range(1)
    if len(starts) == 1 or n_threads == 1:
        return [find(start, start + at_once) for start in starts]
    return list(_pool(n_threads, os.getpid()).map(lambda start: find(start, start + at_once), starts))


@cache
def _pool(n_threads: int, process: int) -> ThreadPoolExecutor:
    """Return the same threads each time, but for a process that was forked: to start them takes a millisecond."""
    return ThreadPoolExecutor(n_threads, "saefw-largest")
