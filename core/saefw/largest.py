"""The largest entries of each row of a matrix, exactly, by reading the matrix twice.

NumPy partitions with vector instructions, which torch does not.

Shapes: r rows, s entries of a row, k the largest of them, e entries in all.
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

BLOCK = 16
"""Of how many entries of a row, far apart, the maximum is taken before the largest are looked for."""

SAMPLED, SPARE = 64, 1.5
"""How many rows tell where the largest of a matrix begin, and how many times as many are then looked at."""

HELD, PIECE = 1 << 18, 1 << 21
"""How many numbers fit a core's cache, about; and how many a thread takes at a time where it does much with them: with
fewer, threads wait for each other at each of NumPy's calls."""


def largest_of_rows(x_rs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return indices, int64, and values [r, k] of the k largest of each row, in any order; of equal ones no more."""
    r, s = x_rs.shape
    if x_rs.device.type != "cpu" or not (r and 0 < k < s):
        values_rk, indices_rk = x_rs.topk(k, dim=1, sorted=False)
        return indices_rk, values_rk
    x_rs, halved = x_rs.detach().contiguous(), x_rs.dtype == torch.bfloat16
    numbers_rs = bits(x_rs) if halved else _numbers(x_rs)

    def find(start: int, stop: int) -> tuple[Array, Array]:
        rows = numbers_rs[start:stop]
        least_r = _kth_of_maxima(rows, k)
        if halved and (least_r is None or (least_r < 0).any()):
            rows = ordered(rows)
            least_r = _kth_of_maxima(rows, k)
        found = _indices(rows, k) if least_r is None else _indices_from(rows, least_r, k)
        if found is None:  # some are no numbers
            found = x_rs[start:stop].topk(k, dim=1, sorted=False).indices.numpy()
        return found, np.take_along_axis(numbers_rs[start:stop], found, axis=1)

    parts = in_parts(find, r, s, PIECE)
    indices_rk, values_rk = (torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True))
    return indices_rk, values_rk.view(torch.bfloat16) if halved else values_rk.to(x_rs.dtype)


def kth_of_maxima(x_rs: Tensor, k: int) -> NDArray[np.float32]:
    """Return for each row of bfloat16 a number [r] that k of its entries reach, seldom many; NaN: none was found."""
    bits_rs = bits(x_rs)

    def find(start: int, stop: int) -> NDArray[np.float32]:
        rows = bits_rs[start:stop]
        kth_r = _kth_of_maxima(rows, k)
        found_r = ordered(np.partition(ordered(rows), -k, axis=1)[:, -k]) if kth_r is None else kth_r
        number_r = (found_r.astype(np.int32) << 16).view(np.float32)
        return number_r if kth_r is None else np.where(kth_r < 0, np.float32(np.nan), number_r)

    r, s = x_rs.shape
    return np.concatenate(in_parts(find, r, s, PIECE))


def _kth_of_maxima(rows: Array, k: int) -> Array | None:
    """Return for each row a number [r] that k of its entries reach: that many blocks do.

    None: there are too few blocks for it to be worth while, or some entries are no numbers. Of bfloat16 the bits: as
    integers they are compared three times as fast, and above zero in the same order; what is below zero says nothing.
    """
    n_blocks = rows.shape[1] // BLOCK
    if n_blocks < 2 * k:
        return None
    maxima = rows[:, : BLOCK * n_blocks].reshape(len(rows), BLOCK, n_blocks).max(axis=1)
    largest = np.partition(maxima, -k, axis=1)[:, -k:]
    nan = np.isnan(largest).any() or np.isnan(rows[:, BLOCK * n_blocks :]).any()
    return None if nan else largest[:, 0]


def _indices_from(rows: Array, least_r: Array, k: int) -> Array | None:
    """Return the same as `_indices`, of rows of which k entries reach `least_r` each."""
    found = rows >= least_r[:, None]
    if np.count_nonzero(found) > BLOCK * k * len(rows):  # very many are equal, as zeros are
        return _indices(rows, k)
    places = places_of(found)
    firsts = np.arange(0, rows.size + 1, rows.shape[1])
    starts = places.searchsorted(firsts)
    among = _indices(side_by_side(rows.reshape(-1).take(places), starts), k)
    return None if among is None else places.take(starts[:-1, None] + among) - firsts[:-1, None]


def side_by_side(values_e: Array, starts: Array) -> Array:
    """Return a matrix of entries, by where those of each row begin, and the end; where there is none, the least."""
    counts = np.diff(starts)
    least = -np.inf if values_e.dtype.kind == "f" else np.iinfo(values_e.dtype).min
    among = np.full((len(counts), counts.max(initial=0)), least, dtype=values_e.dtype)
    among[np.arange(among.shape[1]) < counts[:, None]] = values_e
    return among


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
        # In whatever order they come hangs on how long the rows are.
        places.sort(axis=1)
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
