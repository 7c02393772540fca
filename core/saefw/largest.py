"""The largest entries of each row of a matrix, exactly, by reading the matrix once.

Shapes: r rows, s entries of a row, k the largest of them, b blocks of a row, j entries of a block.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 16
"""Of how many entries, far apart in a row, the maximum is taken before the largest are looked for."""

HELD = 1 << 18
"""How many numbers fit a core's cache, about."""


def largest_of_rows(x_rs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return indices, int64, and values [r, k] of the k largest of each row, in any order; of equal ones no more."""
    r, s = x_rs.shape
    if s % BLOCK or not 0 < 2 * k * BLOCK <= s:
        indices_rk = _indices(x_rs, k)
        return indices_rk, x_rs.gather(1, indices_rk)
    # The k blocks with the largest maxima hold the k largest: what lies in another one has k others at least as large.
    x_rjb = x_rs.reshape(r, BLOCK, s // BLOCK)
    blocks_rk = _indices(x_rjb.amax(dim=1), k)
    x_rs = x_rjb.gather(2, blocks_rk[:, None].expand(-1, BLOCK, -1)).flatten(1)
    found_rk = _indices(x_rs, k)
    indices_rk = found_rk // k * (s // BLOCK) + blocks_rk.gather(1, found_rk % k)
    return indices_rk, x_rs.gather(1, found_rk)


def at_least(x_rs: Tensor, k: int) -> Tensor:
    """Return where each row's k largest are in the flattened matrix, int64, rising; what is tied with the k-th, too.

    0 < k <= s. In rows with NaN there may be fewer.
    """
    r, s = x_rs.shape
    if x_rs.device.type != "cpu":
        least_r = x_rs.topk(k, dim=1, sorted=False).values.amin(dim=1)
        return (x_rs >= least_r[:, None]).flatten().nonzero().flatten()
    # NumPy partitions with vector instructions, which torch does not. It has no type for bfloat16.
    numbers_rs = (x_rs if x_rs.dtype in (torch.float32, torch.float64) else x_rs.float()).detach().numpy()
    at_once = max(1, HELD // s)

    def find(start: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        rows = numbers_rs[start : start + at_once]
        return np.flatnonzero(rows >= np.partition(rows, s - k, axis=1)[:, s - k, None]) + start * s

    if r <= at_once:
        return torch.from_numpy(find(0))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(find, range(0, r, at_once)))))


def _indices(x_rs: Tensor, k: int) -> Tensor:
    """Return the indices [r, k] of the k largest of each row, in any order."""
    r, s = x_rs.shape
    if x_rs.device.type == "cpu" and r and 0 < k < s:
        places = at_least(x_rs, k)
        if len(places) == r * k:
            indices_rk = places.view(r, k) - torch.arange(0, r * s, s)[:, None]
            if indices_rk.amin() >= 0 and indices_rk.amax() < s:
                return indices_rk
    # Some are tied with the k-th, or no numbers.
    return x_rs.topk(k, dim=1, sorted=False).indices
