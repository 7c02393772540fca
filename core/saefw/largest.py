"""The largest entries of each row of a matrix, exactly, by reading the matrix once.

Shapes: r rows, s entries of a row, k the largest of them, b blocks of a row, j entries of a block.
"""

from concurrent.futures import ThreadPoolExecutor

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


def kth_largest(x_rs: Tensor, k: int) -> Tensor:
    """Return the k-th largest of each row, [r]; 0 < k <= s."""
    r, s = x_rs.shape
    if x_rs.device.type != "cpu":
        return x_rs.topk(k, dim=1, sorted=False).values.amin(dim=1)
    # NumPy partitions with vector instructions, which torch does not. It has no type for bfloat16.
    numbers = (x_rs if x_rs.dtype in (torch.float32, torch.float64) else x_rs.float()).detach().numpy()
    found, at_once = np.empty(r, numbers.dtype), max(1, HELD // s)

    def find(start: int) -> None:
        rows = slice(start, start + at_once)
        found[rows] = np.partition(numbers[rows], s - k, axis=1)[:, s - k]

    starts = range(0, r, at_once)
    if len(starts) == 1:
        find(0)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(find, starts))
    return torch.from_numpy(found).to(x_rs.dtype)


def _indices(x_rs: Tensor, k: int) -> Tensor:
    """Return the indices [r, k] of the k largest of each row, in any order."""
    r, s = x_rs.shape
    if x_rs.device.type == "cpu" and 0 < k < s:
        least_r1 = kth_largest(x_rs, k)[:, None]
        places = (x_rs >= least_r1).flatten().nonzero().flatten()
        if len(places) == r * k:
            indices_rk = places.view(r, k) - torch.arange(0, r * s, s)[:, None]
            if not r or (indices_rk.amin() >= 0 and indices_rk.amax() < s):
                return indices_rk
    # Some are tied with the k-th, or no numbers.
    return x_rs.topk(k, dim=1, sorted=False).indices
