"""The SAE that every variant starts from.

Shapes: n tokens, d d_model, s d_sae, e active entries, g prefixes, a dead features; `x_nd` is [n, d].
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from saefw.errors import UserError
from saefw.largest import largest_of_rows
from saefw.near import MANY, WORTH, Near, TooMany, has_bfloat16, rounded
from saefw.origin import whose
from saefw.sparse import (
    Entries,
    Scratch,
    above,
    chosen,
    decode,
    encode,
    largest,
    largest_above_zero,
    largest_of_batch,
    left_over,
    split,
    stacked,
    turned,
    where,
)
from saefw.sums import at, mean_square, total
from saefw.threshold import Threshold

__all__ = [
    "Batch",
    "Codes",
    "Entries",
    "Loss",
    "Sae",
    "Threshold",
    "at",
    "chosen",
    "largest",
    "largest_of_batch",
    "mean_square",
    "where",
]

DENSE = 1 / 16
"""Where more than this share of the entries is active, dense products are quicker than sums over active entries."""

PROBED = 64
"""How many tokens of a batch say which share that is: the first, so that a step depends on its batch alone."""


PART = 2048
"""Tokens whose pre-activations are held at once, where each is looked at by itself."""


class Codes(NamedTuple):
    """The features that fire on each token, sparse: a dense [n, s] of a large SAE does not fit in memory."""

    indices: Tensor
    """int64 [n, k]: which features; where fewer than k fire, any index with value 0."""

    values: Tensor
    """float [n, k], zero or larger, in SAE units."""

    d_sae: int
    """How many features there are."""


class Loss(NamedTuple):
    """What one batch of training says."""

    terms: dict[str, Tensor]
    """Scalars by name, coefficients included; their sum is minimised."""

    fired_s: Tensor
    """int64 [s]: on how many of the batch's tokens each feature fired; no gradient."""


class Batch(NamedTuple):
    """What a variant's `terms` are made of: a batch at its active entries, or dense where very many are active.

    `pre`, `codes` and whatever is made of them have one value an entry, [e] or [n, s], and `features` says of which
    feature: of a bias [s], `at(bias, features)` fits them.
    """

    x_nd: Tensor
    """The normalised tokens."""

    pre: Tensor
    """Pre-activations."""

    codes: Tensor
    """What fires."""

    features: Tensor | slice
    """Index of the features along a tensor [s]."""

    error_gnd: Tensor
    """What each of the prefixes leaves over, the whole last; [1, n, d] where there is but the whole."""

    rebuild: Callable[[Tensor], Tensor]
    """Maps other values than `codes` to their normalised reconstruction [n, d]; the decoder learns nothing by it."""

    def per_token(self, values: Tensor) -> Tensor:
        """Return the sum over features of what there is at the entries, averaged over tokens, a scalar."""
        return total(values) / len(self.x_nd)


class Sae(nn.Module):
    """A sparse autoencoder: normalise, W_enc, select, fire, W_dec.

    Inputs and reconstructions are in the units of the recorded activations; `mean` and `scale` (of the training
    tokens) are inside, so nothing outside ever normalises.

    A variant overrides the least of: `select`, where more decides which features are active than that they are above
    `edge`; `fire`, what active features give; `terms`, what is minimised beside the error. Its training step then works
    on active entries alone. One that overrides `activate` instead is trained densely, by plain autograd.
    """

    mean: Tensor
    scale: Tensor

    aux: float = 0.0
    """Weight of AuxK, the loss that lets dead features learn what the others leave over; 0: none."""

    k_aux: int = 1
    """Dead features that AuxK may use on one token."""

    aux_share: float = 1.0
    """On which share of a batch's tokens AuxK is reckoned, the first."""

    by_token: bool = False
    """Whether a `select` of its own looks at each token by itself in training, too: a batch then takes less memory."""

    nearly: bool = False
    """Whether a `select` of its own asks of pre-activations nothing but what is `largest` or `largest_of_batch`: in
    training it may then be given ones that are known nearly, and, if these do not tell, be asked again with exact ones.
    Both hold for the `select` of the same class."""

    draws: bool = True
    """Whether a training step may draw from torch's generator, of which there is but one: SAEs whose steps do not are
    trained several at a time. Whatever a class says here holds for itself, not for those derived from it."""

    precision: torch.dtype = torch.float32
    """Of the product with W_enc while training; sums and all else are in the type of the weights."""

    def __init__(self, d_model: int, d_sae: int) -> None:
        """Draw unit decoder rows from torch's global generator; W_enc starts as W_dec transposed, biases at zero."""
        super().__init__()
        self.d_model, self.d_sae = d_model, d_sae
        rows_sd = torch.randn(d_sae, d_model)
        rows_sd = rows_sd / rows_sd.norm(dim=1, keepdim=True)
        # In memory W_enc lies feature by feature, as its gradient is summed.
        self.W_enc = nn.Parameter(rows_sd.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(rows_sd)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(()))
        self.scratch = Scratch()

    # What a variant overrides.

    def edge(self) -> Tensor | float:
        """Return what a pre-activation must exceed to be active, a number or [s]; below it `fire` gives 0."""
        return 0.0

    def select(self, pre_ns: Tensor) -> Entries:
        """Return which features are active, of pre-activations [n, s] without gradient; by default those above `edge`.

        In training it may look at the whole batch, in eval mode a token must not depend on its neighbours.
        """
        return above(pre_ns, self.edge())

    def fire(self, pre: Tensor, features: Tensor | slice) -> Tensor:
        """Return the codes, zero or larger, of active pre-activations; by default what is above zero.

        Args:
            pre: of active entries [e], or all [n, s].
            features: of which features they are; `at(bias, features)` fits, of a bias [s].

        """
        return pre.relu()

    def activate(self, pre_ns: Tensor) -> Tensor:
        """Return the dense codes [n, s]; by default what `fire` gives for those that `select` selects."""
        if type(self).select is Sae.select:
            return self.fire(pre_ns, slice(None))
        entries = self._active(pre_ns.detach())
        return entries.dense(self.fire(entries.of(pre_ns), entries.features_e.long()), self.d_sae)

    def dictionary(self) -> Tensor:
        """Return the decoder rows [s, d] with a gradient to the parameters; by default W_dec."""
        return self.W_dec

    def prefixes(self) -> Sequence[int]:
        """Return how many of the first features must each rebuild the tokens, rising to d_sae; by default that alone.

        Called once a step, it may draw from torch's generator.
        """
        return (self.d_sae,)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return the scalars whose sum is minimised, by name; by default the mean square error.

        It is the mean over tokens and dimensions, and over the prefixes where there are several.
        """
        return {"mse": mean_square(batch.error_gnd)}

    def prepare(self, x_nd: Tensor) -> None:
        """Take in a sample of normalised training tokens, once, before the first step; by default nothing.

        Whatever comes of it lies in parameters and buffers.
        """

    def settle(self) -> None:
        """Bring the parameters back to where they may be, after every step of the optimiser; by default nothing."""

    def loss(self, x_nd: Tensor, dead_s: Tensor) -> Loss:
        """Return the training loss of a batch: `terms` and, while features are dead, AuxK.

        It may draw from torch's generator, which the trainer seeds anew for every step.

        Args:
            x_nd: training tokens, already normalised.
            dead_s: bool [s], the features that have not fired for long; for terms that revive them.

        """
        ends = self.prefixes()
        dead = dead_s.nonzero().flatten() if self.aux else dead_s.new_zeros(0, dtype=torch.int64)
        n_aux = math.ceil(self.aux_share * len(x_nd)) if len(dead) else 0
        with torch.no_grad():
            z_nd = x_nd - self.b_dec
            found = self._found(z_nd, dead, n_aux)
        if found is None:
            batch, aux_nd, fired_s = self._dense(x_nd, z_nd, ends, dead, n_aux)
        else:
            batch, aux_nd, fired_s = self._sparse(x_nd, z_nd, ends, *found)
        terms = self._numbers(self.terms(batch))
        if self.aux:
            aux = auxk(batch.error_gnd[-1, :n_aux], aux_nd) if n_aux else x_nd.new_zeros(())
            terms["aux"] = self.aux * aux
        return Loss(terms, fired_s)

    # What everybody uses.

    def may_draw(self) -> bool:
        """Whether a training step may draw from torch's generator: unless it is said that it does not."""
        return bool(vars(self).get("draws", vars(type(self)).get("draws", True)))

    def normalise(self, x_nd: Tensor) -> Tensor:
        """Map recorded activations to SAE units: mean 0, mean square 1 over the training tokens."""
        return (x_nd - self.mean) / self.scale

    def pre(self, x_nd: Tensor) -> Tensor:
        """Return the pre-activations [n, s] of normalised tokens: (x - b_dec) W_enc + b_enc."""
        # (x - b_dec) @ W_enc, but without a gradient [n, d] that only the bias would use: a sixth of a step's work.
        return torch.addmm(self.b_enc - self.b_dec @ self.W_enc, x_nd, self.W_enc)

    def reconstruct(self, codes_ns: Tensor) -> Tensor:
        """Return the normalised reconstruction [n, d] of dense codes."""
        return codes_ns @ self.W_dec + self.b_dec

    def encode(self, x_nd: Tensor) -> Codes:
        """Return the sparse codes of recorded activations."""
        pre_ns = self.pre(self.normalise(x_nd))
        if type(self).activate is Sae.activate and type(self).select is not Sae.select:
            entries = self._active(pre_ns)
            if entries.k is not None:
                indices_e = entries.features_e.long()
                codes_e = self.fire(entries.of(pre_ns), indices_e)
                return Codes(indices_e.view(-1, entries.k), codes_e.view(-1, entries.k), self.d_sae)
        codes_ns = self.activate(pre_ns)
        k = max(1, int((codes_ns > 0).sum(dim=1).max())) if len(codes_ns) else 1
        top = codes_ns.topk(k, dim=1)
        return Codes(top.indices, top.values, self.d_sae)

    def dense(self, x_nd: Tensor) -> Tensor:
        """Return the dense codes [n, s] of recorded activations."""
        return self.activate(self.pre(self.normalise(x_nd)))

    def rebuild(self, indices_nk: Tensor, values_nk: Tensor) -> Tensor:
        """Return the normalised reconstruction [n, d] of sparse codes."""
        # A gather of decoder rows would hold [n, k, d]; the bag sums them as it reads.
        return embedding_bag(indices_nk, self.W_dec, per_sample_weights=values_nk, mode="sum") + self.b_dec

    def decode(self, codes: Codes) -> Tensor:
        """Return the reconstruction [n, d] of sparse codes, in the units of the activations."""
        return self.rebuild(codes.indices, codes.values) * self.scale + self.mean

    def forward(self, x_nd: Tensor) -> Tensor:
        """Return the reconstruction of recorded activations, in their own units."""
        return self.decode(self.encode(x_nd))

    # How a step is done.

    def _numbers(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what `terms` gave, which must be numbers by name: a message of torch's would name neither."""
        if not isinstance(terms, dict):
            raise UserError(f"{whose(type(self))}: terms() must return a dict of scalars by name (got {terms!r})")
        for name, term in terms.items():
            if term.shape:
                raise UserError(f"{whose(type(self))}: the term '{name}' must be a scalar (got {list(term.shape)})")
        return terms

    def _active(self, pre_ns: Tensor) -> Entries:
        """Return what `select` gave, which must be entries: a message from further inside would not name it."""
        found = self.select(pre_ns)
        if not isinstance(found, Entries):
            who, got = whose(type(self)), type(found).__name__
            raise UserError(f"{who}: select() must return Entries, as where(mask) and largest() do (got a {got})")
        return found

    def _encoder(self, x_nd: Tensor) -> tuple[Tensor, Tensor]:
        """Return W_enc and b_enc in the type of their product with such tokens."""
        dtype = self.precision if x_nd.dtype == torch.float32 else x_nd.dtype
        return self.W_enc.to(dtype), self.b_enc.to(dtype)

    def _product(self, z_nd: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        """Return z W_enc + b_enc [n, s] in their type, in memory that the next call uses again."""
        into_ns = self.scratch.empty(len(z_nd), self.d_sae, W_enc.dtype, z_nd.device)
        # As a matrix of its own: entries that were read from an earlier one are not taken for entries of this.
        return torch.addmm(b_enc, z_nd.to(W_enc.dtype), W_enc, out=into_ns).view_as(into_ns)

    def _found(self, z_nd: Tensor, dead: Tensor, n_aux: int) -> tuple[Entries, Entries | None] | None:
        """Return the active entries of all tokens, and AuxK's of the first few, with their pre-activations.

        None where the variant is dense, or so many are active that dense is quicker.
        """
        if type(self).activate is not Sae.activate:
            return None
        by_edge = type(self).select is Sae.select
        parts = torch.split(z_nd, PART if by_edge or self._says("by_token") else max(1, len(z_nd)))
        worth = (by_edge or self._says("nearly")) and self.W_enc.numel() >= WORTH and has_bfloat16()
        if worth and self.precision == z_nd.dtype == torch.float32 and z_nd.device.type == "cpu":
            encoder = rounded(self.W_enc, self.b_enc)
            try:
                return self._selected([Near(z_nd, self.W_enc, self.b_enc, encoder, self.scratch)], z_nd, dead, n_aux)
            except TooMany:
                pass
        exact = self._encoder(z_nd)
        return self._selected((self._product(part_nd, *exact) for part_nd in parts), z_nd, dead, n_aux)

    def _says(self, what: str) -> bool:
        """Whether an attribute is set beside the `select` that is used, or on this SAE: one may have overridden it."""
        owner = next(cls for cls in type(self).__mro__ if "select" in vars(cls))
        return bool(vars(self).get(what, vars(owner).get(what)))

    def _selected(
        self, parts: Iterable[Tensor | Near], z_nd: Tensor, dead: Tensor, n_aux: int
    ) -> tuple[Entries, Entries | None] | None:
        """Return the same as `_found`, of the pre-activations of some tokens after the other."""
        by_edge = type(self).select is Sae.select
        found: list[Entries] = []
        aux: list[Entries] = []
        done = 0
        for pre in parts:
            if by_edge and not found:
                few_ns = pre.first(PROBED) if isinstance(pre, Near) else pre[:PROBED]
                share = float((few_ns > self.edge()).float().mean())
                if share > DENSE:
                    return None
                if share > MANY and isinstance(pre, Near):
                    raise TooMany
            # What is known nearly answers to all that those ask who are given it.
            found.append(self._active(cast(Tensor, pre)).read(pre))
            if n_aux > done:
                few_nd = z_nd[done : min(n_aux, done + len(pre))]
                aux.extend(largest_above_zero(pre_na, dead, self.k_aux) for pre_na in self._of_dead(pre, few_nd, dead))
            done += len(pre)
        return stacked(found, len(z_nd)), stacked(aux, n_aux) if aux else None

    def _of_dead(self, pre: Tensor | Near, z_nd: Tensor, dead: Tensor) -> Iterator[Tensor]:
        """Yield the pre-activations [n, a] of the dead features on the first few tokens, part by part."""
        if isinstance(pre, Tensor):
            yield pre[: len(z_nd)].gather(1, dead.expand(len(z_nd), -1))
            return
        W_da, b_a = self.W_enc.T[dead].T, self.b_enc[dead]
        for part_nd in torch.split(z_nd, PART):
            yield torch.addmm(b_a, part_nd, W_da)

    def _sparse(
        self, x_nd: Tensor, z_nd: Tensor, ends: Sequence[int], entries: Entries, aux: Entries | None
    ) -> tuple[Batch, Tensor, Tensor]:
        """Return the batch by its active entries, what AuxK rebuilds [n, d], and how often each feature fired [s]."""
        n, main = len(x_nd), split(entries, ends)
        # What AuxK rebuilds is decoded beside the prefixes, as further rows.
        every = main if aux is None else stacked([main, aux], n)
        by_feature = turned(every, self.d_sae)
        assert every.known_e is not None
        known_e = every.known_e.to(x_nd.dtype)
        pre_e = encode(known_e, z_nd, self.W_enc, self.b_enc, self.b_dec, by_feature)
        features_e, W_sd = main.features_e.long(), self.dictionary()
        # Their gradients come together in one copy; those of slices would each be as large as the whole.
        pre_e, aux_e = torch.split(pre_e, [len(features_e), len(pre_e) - len(features_e)])
        codes_e = self.fire(pre_e, features_e)
        rows_rd = decode(torch.cat([codes_e, aux_e]), W_sd, every, by_feature)
        prefixes_rd, aux_nd = torch.split(rows_rd, [len(ends) * n, len(rows_rd) - len(ends) * n])
        error_gnd = left_over(z_nd, self.b_dec, prefixes_rd.view(len(ends), n, -1))

        def rebuild(values_e: Tensor) -> Tensor:
            rows_rd = decode(values_e, W_sd.detach(), main, None)
            return rows_rd.view(len(ends), n, -1).sum(dim=0) + self.b_dec.detach()

        fired_s = torch.bincount(features_e[codes_e > 0], minlength=self.d_sae)
        return Batch(x_nd, pre_e, codes_e, features_e, error_gnd, rebuild), aux_nd, fired_s

    def _dense(
        self, x_nd: Tensor, z_nd: Tensor, ends: Sequence[int], dead: Tensor, n_aux: int
    ) -> tuple[Batch, Tensor, Tensor]:
        """Return the same as `_sparse`, by plain autograd on all of [n, s]."""
        with torch.no_grad():
            pre_ns = self._product(z_nd, *self._encoder(z_nd))
        pre_ns = encode(pre_ns.to(x_nd.dtype), z_nd, self.W_enc, self.b_enc, self.b_dec)
        codes_ns, W_sd = self.activate(pre_ns), self.dictionary()
        if codes_ns.shape != pre_ns.shape:
            who, got, wanted = whose(type(self)), list(codes_ns.shape), list(pre_ns.shape)
            raise UserError(f"{who}: activate() must give codes [n, s], here {wanted} (got {got})")
        parts = [codes_ns[:, start:end] @ W_sd[start:end] for start, end in pairwise((0, *ends))]
        x_hat_gnd = torch.stack(parts).cumsum(dim=0) + self.b_dec
        pre_na = pre_ns[:n_aux, dead]
        if len(dead) > self.k_aux:
            indices_nk, _ = largest_of_rows(pre_na.detach(), self.k_aux)
            pre_na = torch.zeros_like(pre_na).scatter(1, indices_nk, pre_na.gather(1, indices_nk))

        def rebuild(values_ns: Tensor) -> Tensor:
            return values_ns @ W_sd.detach() + self.b_dec.detach()

        batch = Batch(x_nd, pre_ns, codes_ns, slice(None), x_nd - x_hat_gnd, rebuild)
        return batch, pre_na.relu() @ W_sd[dead], (codes_ns > 0).sum(dim=0)


def auxk(error_nd: Tensor, x_hat_nd: Tensor) -> Tensor:
    """Return how badly the dead features rebuild the error, relative to its variance over the batch, a scalar.

    On each token the `k_aux` largest of the dead take part, and of those the ones above zero: one that is below zero
    on every token is not reached. The error is a fixed target, so the live features learn nothing from it; the decoder
    bias is no part of it and is not added. Gao et al., Scaling and evaluating sparse autoencoders, 2024, appendix A.2.

    Args:
        error_nd: what the live features leave over.
        x_hat_nd: what the dead ones rebuild of it.

    """
    target_nd = error_nd.detach()
    rest = mean_square(x_hat_nd - target_nd)
    variance = mean_square(target_nd - target_nd.mean(dim=0))
    # A batch whose tokens all leave the same error has no variance to compare with.
    return torch.where(variance > 0, rest / torch.where(variance > 0, variance, 1), 0)
