"""The few entries of sparse codes, and exact gradients by them.

Of a training step only x @ W_enc has to be dense. What follows reads and writes the active entries alone: decoding sums
rows of W_dec, the gradient of a code is one dot product, and the gradient of a row of W_enc or W_dec sums the tokens
on which its feature is active. All of it is equal to dense autograd up to the order of sums, which is always the same.

Shapes: n tokens, d d_model, s d_sae, k a token's entries, e entries, r rows of entries (a token may have several).
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from saefw.largest import largest_of_all, largest_of_rows, places_above


class Known(Protocol):
    """Pre-activations [n, s] that need not all be known exactly, as `near.Near`: what is asked of them is."""

    def above(self, edge: Tensor | float) -> "Entries":
        """Return the entries that are larger than an edge: a number, or one of each feature [s]."""

    def largest(self, k: int) -> "Entries":
        """Return each token's k largest; of equal ones no more than that."""

    def largest_of_batch(self, k: int) -> "Entries":
        """Return the k n largest of all n tokens together; of equal ones no more than that."""

    def at(self, entries: "Entries") -> Tensor:
        """Return the exact values [e] at any entries."""


class Entries(NamedTuple):
    """Which features are active on which token: row by row, as in a compressed sparse matrix [r, s]."""

    starts_r: Tensor
    """int32 [r + 1]: where the entries of each row begin, and the end."""

    features_e: Tensor
    """int32 [e]: the feature of each entry."""

    n: int
    """Tokens; row r is of token r modulo n."""

    k: int | None = None
    """How many entries each row has, if it is the same number."""

    source: Tensor | Known | None = None
    """The matrix [n, s] that they were chosen from, if its values at them were kept; it must not change any more."""

    known_e: Tensor | None = None
    """Those values [e]."""

    def rows(self) -> Tensor:
        """Return the row of each entry, int32 [e]."""
        return torch.repeat_interleave(self.starts_r.diff(), output_size=len(self.features_e))

    def of(self, x_ns: Tensor | Known) -> Tensor:
        """Return the values [e] of a dense matrix [n, s] at the entries."""
        if x_ns is self.source and self.known_e is not None:
            return self.known_e
        if not isinstance(x_ns, Tensor):
            return x_ns.at(self)
        return x_ns.reshape(-1)[self.rows().long() % self.n * x_ns.shape[1] + self.features_e]

    def read(self, x_ns: Tensor | Known) -> "Entries":
        """Return the same with their values, which no longer need the matrix."""
        return self._replace(known_e=self.of(x_ns), source=None)

    def dense(self, values_e: Tensor, d_sae: int) -> Tensor:
        """Return the dense matrix [r, s] that has these values at the entries, and zeros elsewhere."""
        x_rs = values_e.new_zeros(len(self.starts_r) - 1, d_sae)
        return x_rs.index_put((self.rows().long(), self.features_e.long()), values_e)


def chosen(indices_nk: Tensor, kept_nk: Tensor | None = None) -> Entries:
    """Return the entries of features by their indices [n, k], none twice a token; of those only the kept ones."""
    n, k = indices_nk.shape
    if kept_nk is None:
        starts_n = torch.arange(n + 1, dtype=torch.int32, device=indices_nk.device) * k
        return Entries(starts_n, indices_nk.int().flatten(), n, k)
    starts_n = torch.nn.functional.pad(kept_nk.sum(dim=1).cumsum(dim=0), (1, 0)).int()
    return Entries(starts_n, indices_nk[kept_nk].int(), n)


def where(mask_ns: Tensor) -> Entries:
    """Return the entries where a mask [n, s] holds."""
    return entries_at(mask_ns.flatten().nonzero().flatten(), *mask_ns.shape)


def above(pre_ns: Tensor | Known, edge: Tensor | float) -> Entries:
    """Return the entries that are larger than an edge: a number, or one of each feature [s]."""
    if not isinstance(pre_ns, Tensor):
        return pre_ns.above(edge)
    places_e, known_e = places_above(pre_ns, edge)
    return entries_at(places_e, *pre_ns.shape)._replace(source=pre_ns, known_e=known_e)


def largest(pre_ns: Tensor | Known, k: int) -> Entries:
    """Return each token's k largest; of equal ones no more than that."""
    if not isinstance(pre_ns, Tensor):
        return pre_ns.largest(k)
    indices_nk, known_nk = largest_of_rows(pre_ns, k)
    found = chosen(indices_nk)
    return found if pre_ns.requires_grad else found._replace(source=pre_ns, known_e=known_nk.flatten())


def largest_of_batch(pre_ns: Tensor | Known, k: int) -> Entries:
    """Return the k n largest of all n tokens together; of equal ones no more than that."""
    if not isinstance(pre_ns, Tensor):
        return pre_ns.largest_of_batch(k)
    places_e, known_e = largest_of_all(pre_ns, k * len(pre_ns))
    return entries_at(places_e, *pre_ns.shape)._replace(source=pre_ns, known_e=known_e)


def largest_above_zero(pre_na: Tensor, features_a: Tensor, k: int) -> Entries:
    """Return, of pre-activations [n, a] of some features, each token's k largest above zero; of equal ones no more."""
    if len(features_a) <= k:
        found = above(pre_na, 0.0)
        return found._replace(features_e=features_a.int()[found.features_e], source=None)
    indices_nk, known_nk = largest_of_rows(pre_na, k)
    kept_nk = known_nk > 0
    return chosen(features_a[indices_nk], kept_nk)._replace(known_e=known_nk[kept_nk])


GATHERED = 1 << 16
"""Of how many entries the vectors lie side by side in memory, where there is no other way."""


def entries_at(places_e: Tensor, n: int, s: int) -> Entries:
    """Return the entries at ascending places, int64, of the flattened [n, s]."""
    firsts_n = torch.arange(0, (n + 1) * s, s, device=places_e.device)
    starts_n = torch.searchsorted(places_e, firsts_n, out_int32=True)
    # Of which row each is, is known by now; a division for each takes longer.
    rows_e = torch.repeat_interleave(starts_n.diff(), output_size=len(places_e))
    return Entries(starts_n, (places_e - firsts_n[rows_e]).int(), n)


def stacked(parts: Sequence[Entries], n: int) -> Entries:
    """Return the rows of several, one after the other, with their known values; they are of n tokens in all."""
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part.features_e))
    starts = [part.starts_r[:-1] + end for part, end in zip(parts, ends, strict=False)]
    last = parts[-1].starts_r[-1:] + ends[-2]
    known = [part.known_e for part in parts if part.known_e is not None]
    known_e = torch.cat(known) if len(known) == len(parts) else None
    return Entries(torch.cat([*starts, last]), torch.cat([part.features_e for part in parts]), n, known_e=known_e)


def split(entries: Entries, ends: Sequence[int]) -> Entries:
    """Return the same entries in len(ends) times as many rows: first those of features below ends[0], and so on."""
    if len(ends) == 1:
        return entries
    edges = torch.tensor(ends[:-1], dtype=torch.int32, device=entries.features_e.device)
    rows_e = torch.bucketize(entries.features_e, edges, right=True) * entries.n + entries.rows()
    rows_e, order_e = rows_e.sort(stable=True)
    known_e = None if entries.known_e is None else entries.known_e[order_e]
    starts_r = _starts(rows_e, entries.n * len(ends))
    return Entries(starts_r, entries.features_e[order_e], entries.n, known_e=known_e)


def _starts(sorted_e: Tensor, n: int) -> Tensor:
    """Return where each of the numbers 0..n-1 begins among sorted ones, and the end, int32 [n + 1]."""
    numbers = torch.arange(n + 1, dtype=sorted_e.dtype, device=sorted_e.device)
    return torch.searchsorted(sorted_e, numbers, out_int32=True)


class Turned(NamedTuple):
    """Entries feature by feature: the transposed matrix."""

    order_e: Tensor
    """int64 [e]: which entry comes next."""

    starts_s: Tensor
    """int32 [s + 1]: where the entries of each feature begin, and the end."""

    rows_e: Tensor
    """int32 [e]: their rows."""

    tokens_e: Tensor
    """int32 [e]: their tokens."""


def turned(entries: Entries, d_sae: int) -> Turned:
    """Return the entries feature by feature, those of one feature in the order of their rows."""
    features_e, order_e = entries.features_e.sort(stable=True)
    rows_e = entries.rows()[order_e]
    tokens_e = rows_e if len(entries.starts_r) - 1 == entries.n else rows_e % entries.n
    return Turned(order_e, _starts(features_e, d_sae), rows_e, tokens_e)


def encode(
    pre: Tensor, x_nd: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, by_feature: Turned | None = None
) -> Tensor:
    """Return pre-activations that are known already with their gradient to W_enc [d, s], b_enc [s] and b_dec [d].

    Args:
        pre: what x_nd @ W_enc + b_enc is, all of it [n, s], or at entries [e].
        x_nd: what the encoder saw, tokens less b_dec; it gets no gradient itself.
        W_enc: the encoder.
        b_enc: its bias.
        b_dec: what was taken off the tokens.
        by_feature: the entries, feature by feature; None: all of [n, s].

    """
    found: Tensor = _Encode.apply(pre, x_nd, W_enc, b_enc, b_dec, by_feature)  # type: ignore[no-untyped-call]
    return found


def decode(codes_e: Tensor, W_dec: Tensor, at: Entries, by_feature: Turned | None) -> Tensor:
    """Return codes @ W_dec [r, d] of the codes at entries, with a gradient to both; None: W_dec [s, d] needs none."""
    found: Tensor = _Decode.apply(codes_e, W_dec, at, by_feature)  # type: ignore[no-untyped-call]
    return found


def left_over(z_nd: Tensor, b_dec: Tensor, rows_gnd: Tensor) -> Tensor:
    """Return what is left of tokens less b_dec after taking off the first of the rows, the first two, ... [g, n, d].

    Args:
        z_nd: tokens less b_dec already; they get no gradient.
        b_dec: gets one.
        rows_gnd: get one.

    """
    found: Tensor = _LeftOver.apply(z_nd, b_dec, rows_gnd)  # type: ignore[no-untyped-call]
    return found


class _Encode(Function):
    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, x_nd: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, turned: Turned | None
    ) -> Tensor:
        ctx.save_for_backward(x_nd, W_enc, *(turned or ()))
        return pre.view_as(pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_nd, W_enc, *turned = ctx.saved_tensors
        if turned:
            order_e, starts_s, _, tokens_e = turned
            weights_e = gradient[order_e]
            W_sd = _sums(weights_e, x_nd, tokens_e, starts_s)
            b_s = _sums(weights_e, x_nd.new_ones(len(x_nd), 1), tokens_e, starts_s).squeeze(1)
        else:
            W_sd, b_s = gradient.T @ x_nd, gradient.sum(dim=0)
        return None, None, W_sd.T, b_s, -(W_enc @ b_s), None


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, codes_e: Tensor, W_sd: Tensor, at: Entries, turned: Turned | None) -> Tensor:
        ctx.save_for_backward(codes_e, W_sd, at.starts_r, at.features_e, *(turned or ()))
        return _sums(codes_e, W_sd, at.features_e, at.starts_r)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_rd: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        codes_e, W_sd, starts_r, features_e, *turned = ctx.saved_tensors
        code_e = W = None
        if ctx.needs_input_grad[0] and turned:
            # Feature by feature: the gradient fits the processor's cache, W_dec does not, and is read once so.
            order_e, starts_s, rows_e, _ = turned
            code_e = torch.empty_like(codes_e).index_put_((order_e,), dots(W_sd, gradient_rd, starts_s, rows_e))
        elif ctx.needs_input_grad[0]:
            code_e = dots(gradient_rd, W_sd, starts_r, features_e)
        if ctx.needs_input_grad[1]:
            order_e, starts_s, rows_e, _ = turned
            W = _sums(codes_e[order_e], gradient_rd, rows_e, starts_s)
        return code_e, W, None, None


class _LeftOver(Function):
    # As -cumsum + z, but along a dimension where torch's is slow.

    @staticmethod
    def forward(ctx: Any, z_nd: Tensor, b_dec: Tensor, rows_gnd: Tensor) -> Tensor:
        left_gnd = torch.empty_like(rows_gnd)
        for rows_nd, left_nd in zip(rows_gnd, left_gnd, strict=True):
            z_nd = torch.sub(z_nd, rows_nd, out=left_nd)
        return left_gnd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_gnd: Tensor) -> tuple[None, Tensor, Tensor]:
        taken_gnd = -gradient_gnd
        for g in range(len(taken_gnd) - 1, 0, -1):
            taken_gnd[g - 1] += taken_gnd[g]
        return None, taken_gnd[0].sum(dim=0), taken_gnd


def _sums(weights_e: Tensor, x_nd: Tensor, indices_e: Tensor, starts_r: Tensor) -> Tensor:
    """Return for each row the weighted sum [r, d] of the vectors x that its entries name."""
    # Of what needs a gradient, torch would note more, to have it ready for that.
    x_nd, weights_e = x_nd.detach(), weights_e.detach()
    return embedding_bag(indices_e, x_nd, starts_r, mode="sum", per_sample_weights=weights_e, include_last_offset=True)


def dots(x_rd: Tensor, W_sd: Tensor, starts_r: Tensor, features_e: Tensor) -> Tensor:
    """Return x_r . W_s for each entry, [e]; rows and columns may as well be exchanged."""
    if not len(features_e) or x_rd.device.type == "mps":  # which has no compressed matrices
        return _gathered(x_rd, W_sd, starts_r, features_e)
    at_rs = _compressed(starts_r, features_e, x_rd.new_zeros(len(features_e)), (len(x_rd), len(W_sd)))
    found: Tensor = torch.sparse.sampled_addmm(at_rs, x_rd.contiguous(), W_sd.T, beta=0).values()
    return found


def _gathered(x_rd: Tensor, W_sd: Tensor, starts_r: Tensor, features_e: Tensor) -> Tensor:
    """Return the same, slowly."""
    rows_e = Entries(starts_r, features_e, len(x_rd)).rows()
    parts = zip(torch.split(rows_e, GATHERED), torch.split(features_e, GATHERED), strict=True)
    return torch.cat([(x_rd[rows.long()] * W_sd[features.long()]).sum(dim=1) for rows, features in parts])


def _compressed(starts_r: Tensor, features_e: Tensor, values_e: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts_r, features_e, values_e, size, check_invariants=False)


with warnings.catch_warnings():
    # Torch says once that such matrices are new in it. Later several threads may be at work, and these have all their
    # warnings in common.
    warnings.filterwarnings("ignore", "Sparse")
    _compressed(torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0), (1, 1))


class Scratch:
    """Memory for pre-activations, the same in every step: to ask for it anew takes long where it is much."""

    def __init__(self) -> None:
        """Hold none yet."""
        self._held: Tensor | None = None
        self._last: Tensor | None = None

    def empty(self, n: int, s: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return [n, s] with anything in it."""
        last = self._last
        if last is not None and last.shape == (n, s) and last.dtype == dtype and last.device == device:
            return last
        held, n_bytes = self._held, n * s * dtype.itemsize
        if held is None or len(held) < n_bytes or held.device != device:
            held = self._held = torch.empty(n_bytes, dtype=torch.uint8, device=device)
        self._last = held[:n_bytes].view(dtype).view(n, s)
        return self._last
