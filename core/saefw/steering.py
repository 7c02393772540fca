"""Edits features of tokens, runs the rest of the backbone, reads the probe; the page and the steer stage use it.

An edit changes codes z of some features to z'. What is added to the tokens is scale * (z' - z) @ W_dec and nothing
else, x' = x + delta: the SAE's error and its bias stay as they are, so an edit that changes no code changes no bit
(as in saev's demos, and `use_error_term` of SAELens). Without the error, the tokens are replaced by the SAE's
reconstruction before anything is edited.

Shapes: b images, t tokens, p edited tokens of an image, f edited features, d d_model, s d_sae, c classes, m classes
that an image speaks for.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import dropwhile, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from saefw import inputs
from saefw.blocks import tokens_after
from saefw.inputs import Token
from saefw.plugin import Backbone, Codes, Probe, UserError
from saefw.sae import Sae

MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "set": lambda z, amount: amount.expand_as(z),
    "add": lambda z, amount: z + amount,
    "scale": lambda z, amount: z * amount,
    "ablate": lambda z, amount: z - amount * z,
}
"""What becomes of codes z under an amount, by mode. Setting to 0 switches a feature off, as does ablating 1."""

FACTORS = ("scale", "ablate")
"""The modes whose amounts have no unit: a factor, and the share that is taken away."""


class Edit(NamedTuple):
    """What is done to a feature, and where."""

    feature: int
    mode: str
    """One of MODES."""

    amount: float | Tensor
    """In the units of codes, or a factor (FACTORS): a number, or one for each token that may be edited, [p]."""

    patches: Sequence[int] | None = None
    """Which of the tokens that may be edited, by number; None: all."""


class Reading(NamedTuple):
    """Images as the backbone, the SAE and the probe see them before any edit."""

    tokens_btd: Tensor
    """float32 [b, t, d]: what the SAE's block puts out; without the SAE's error, with the reconstruction in place."""

    codes: Codes
    """Of the tokens that may be edited, image by image: [b * p, k]."""

    logits_bc: Tensor
    """float32 [b, c]: what the probe says."""


class Steering:
    """A backbone, an SAE on the output of one of its blocks, and a probe on the output of that or a later one."""

    def __init__(
        self,
        backbone: Backbone,
        sae: Sae,
        probe: Probe,
        layer: int,
        probe_layer: int,
        place: str = "patches",
        keep_error: bool = True,
        token: Token = "cls",
        patches: Sequence[int] | None = None,
    ) -> None:
        """Put the parts together; all in eval mode and on one device.

        Args:
            backbone: with a [CLS] token, if the probe reads that.
            sae: on the output of block `layer`.
            probe: on the output of block `probe_layer`, before any final norm.
            layer: counted from 0.
            probe_layer: counted from 0; only the blocks up to it are run.
            place: the tokens that are edited, `patches` or `cls`.
            keep_error: add edits to the tokens as they are; if not, to the SAE's reconstruction of them.
            token: what the probe reads.
            patches: those that may be edited, ascending, row by row from 0; None: all.

        Raises:
            UserError: an edit there cannot reach the probe.

        """
        inputs.check_reach("steer", backbone.info, layer, probe_layer, place, token)
        if token == "cls" and not backbone.info.has_cls:
            raise UserError("steer: the backbone has no [CLS], which the probe reads")
        self.backbone, self.sae, self.probe = backbone, sae, probe
        self.layer, self.probe_layer, self.place, self.keep_error = layer, probe_layer, place, keep_error
        self.token = token
        n_prefix = backbone.info.n_prefix
        self.edited: slice | list[int] = slice(0, 1) if place == "cls" else slice(n_prefix, None)
        if patches is not None:
            self.edited = [n_prefix + patch for patch in patches]

    # Before

    def read(self, images: Tensor) -> Reading:
        """Read prepared images, float32 [b, 3, height, width]."""
        with torch.no_grad():
            return self.reading(tokens_after(self.backbone, images, self.layer))

    @torch.no_grad()
    def reading(self, tokens_btd: Tensor) -> Reading:
        """Read the tokens that block `layer` put out, float32 [b, t, d], for instance recorded ones."""
        tokens_btd, codes = self.coded(tokens_btd)
        return Reading(tokens_btd, codes, self.logits(tokens_btd))

    def coded(self, tokens_btd: Tensor) -> tuple[Tensor, Codes]:
        """Return the tokens that edits start from, [b, t, d], and the codes [b * p, k] of those that may be edited."""
        codes = self.sae.encode(tokens_btd[:, self.edited].flatten(0, 1))
        if not self.keep_error:
            tokens_btd = tokens_btd.clone()
            tokens_btd[:, self.edited] = self.sae.decode(codes).view(len(tokens_btd), -1, tokens_btd.shape[2])
        return tokens_btd, codes

    def logits(self, tokens_btd: Tensor) -> Tensor:
        """Return what the probe says, [b, c], if block `layer` puts out these tokens."""
        if self.token == "cls" and self.probe_layer > self.layer:
            before_btd = self.backbone.tail(tokens_btd, self.layer + 1, self.probe_layer - 1)
            out: Tensor = self.probe(self.backbone.cls_after(before_btd, self.probe_layer))
            return out
        return self._read(self.backbone.tail(tokens_btd, self.layer + 1, self.probe_layer))

    def _read(self, tokens_btd: Tensor) -> Tensor:
        """Return what the probe says, [b, c], of the tokens of its own block."""
        out: Tensor = self.probe(inputs.taken(tokens_btd, self.token, self.backbone.info.n_prefix, self.backbone))
        return out

    def observed(self, reading: Reading, features_bf: Tensor) -> Tensor:
        """Return the codes [b, p, f] of some features of each image (int64 [b, f]); 0 where one does not fire."""
        indices, values = reading.codes.indices, reading.codes.values
        b, f = features_bf.shape
        of_token_nf = features_bf.repeat_interleave(len(indices) // b, dim=0)
        # Feature by feature: [n, k] at a time. At most one entry of a row is not 0, so the sum is exact.
        columns = [(values * (indices == of_token_nf[:, i, None])).sum(dim=1) for i in range(f)]
        return torch.stack(columns, dim=1).view(b, -1, f)

    def fires(self, reading: Reading) -> Tensor:
        """Return which features fire on an edited token of each image, bool [b, s]."""
        b = len(reading.tokens_btd)
        indices_bn, values_bn = (x.reshape(b, -1) for x in (reading.codes.indices, reading.codes.values))
        # A feature may be listed where it does not fire, so the largest of its values counts.
        most_bs = values_bn.new_zeros(b, reading.codes.d_sae)
        return most_bs.scatter_reduce(1, indices_bn, values_bn, "amax") > 0

    # After

    @torch.no_grad()
    def edit(self, reading: Reading, edits: Sequence[Edit]) -> Tensor:
        """Return the logits [b, c] after all edits at once; `reading` is left as it is.

        Each starts from the codes as they were read, and their changes add up.
        """
        return self.after(reading, self.change(reading, edits)) if edits else reading.logits_bc.clone()

    @torch.no_grad()
    def change(self, reading: Reading, edits: Sequence[Edit]) -> Tensor:
        """Return what all edits together add to the edited tokens, [b, p, d], in the units of the tokens."""
        device = reading.tokens_btd.device
        features_f = torch.tensor([edit.feature for edit in edits], dtype=torch.int64, device=device)
        features_bf = features_f.expand(len(reading.tokens_btd), -1)
        if not edits:
            return torch.zeros_like(reading.tokens_btd[:, self.edited])
        z_bpf = self.observed(reading, features_bf)
        change_bpf = torch.zeros_like(z_bpf)
        for i, edit in enumerate(edits):
            amount = torch.as_tensor(edit.amount, dtype=z_bpf.dtype, device=device)
            where = slice(None) if edit.patches is None else list(edit.patches)
            change_bpf[:, where, i] = (MODES[edit.mode](z_bpf[..., i], amount) - z_bpf[..., i])[:, where]
        return self._written(change_bpf, features_bf)

    @torch.no_grad()
    def delta(self, reading: Reading, features_bf: Tensor, amounts_bf: Tensor, mode: str) -> Tensor:
        """Return what an edit adds to the edited tokens, [b, p, d].

        Args:
            reading: of b images.
            features_bf: int64 [b, f], for each image other features, none twice.
            amounts_bf: float32 [b, f], in the units of codes (a factor with mode scale), the same on every token.
            mode: one of MODES.

        """
        z_bpf = self.observed(reading, features_bf)
        return self._written(MODES[mode](z_bpf, amounts_bf[:, None]) - z_bpf, features_bf)

    @torch.no_grad()
    def after(self, reading: Reading, delta_bpd: Tensor) -> Tensor:
        """Return the logits [b, c] when `delta_bpd` is added to the edited tokens."""
        tokens_btd = reading.tokens_btd.clone()
        tokens_btd[:, self.edited] += delta_bpd
        return self.logits(tokens_btd)

    @torch.no_grad()
    def directly(self, reading: Reading, delta_bpd: Tensor) -> Tensor:
        """Return the logits [b, c] when `delta_bpd` is added to the tokens that the probe reads, past the blocks.

        That is the direct part of an edit: what it does by way of the residual stream alone.

        Raises:
            UserError: the probe reads none of the edited tokens.

        """
        if inputs.held(self.token) != self.place:
            edited, read = inputs.called("cls") if self.place == "cls" else "patches", inputs.called(self.token)
            raise UserError(f"steer: an edit of {edited} goes through blocks alone, since the probe reads {read}")
        tokens_btd = self.backbone.tail(reading.tokens_btd, self.layer + 1, self.probe_layer).clone()
        tokens_btd[:, self.edited] += delta_bpd
        return self._read(tokens_btd)

    def _written(self, change_bpf: Tensor, features_bf: Tensor) -> Tensor:
        """Return what a change of codes writes into the tokens, in their own units, [b, p, d]."""
        return self.sae.scale * (change_bpf @ self.sae.W_dec[features_bf])

    # Which way is up

    def gradients(self, tokens_btd: Tensor, classes_bm: Tensor) -> Tensor:
        """Return the gradient of some classes' logits by the edited tokens, summed over those, float64 [b, m, d].

        By linearity that is the gradient by one vector added to all edited tokens of an image. One pass back serves
        all images, each with a class of its own: as many passes as an image speaks for classes.

        Args:
            tokens_btd: what block `layer` puts out.
            classes_bm: int64 [b, m], for each image the classes that it speaks for.

        """
        shift_b1d = torch.zeros_like(tokens_btd[:, :1]).requires_grad_()
        edited_t1 = torch.zeros_like(tokens_btd[0, :, :1])
        edited_t1[self.edited] = 1
        with torch.enable_grad():
            picked_bm = self.logits(tokens_btd + edited_t1 * shift_b1d).gather(1, classes_bm)
            rows = [torch.autograd.grad(x, shift_b1d, retain_graph=True)[0].cpu() for x in picked_bm.sum(dim=0)]
        return torch.cat(rows, dim=1).double()

    def effects(self, gradient_cd: Tensor, p99_s: Tensor) -> Tensor:
        """Predict what each feature does to each class's logit, in logits, float64 [s, c].

        To first order: the mean over train images of the logit's gradient summed over the edited tokens, times the
        decoder row (times scale), times p99. So it is the effect of adding the full amount, 1 p99, everywhere.

        Args:
            gradient_cd: the mean of `gradients` over the images that speak for a class.
            p99_s: each feature's p99, in the units of codes.

        """
        W_dec_sd = self.sae.W_dec.detach().cpu().double() * float(self.sae.scale)
        return (W_dec_sd @ gradient_cd.cpu().double().T) * p99_s.cpu().double()[:, None]


class Together:
    """Several SAEs on the blocks of one backbone, edited in one pass; one probe reads what comes of it.

    Edits after the same block start from the same tokens, and what they add adds up. Those after a later block start
    from what comes there, edits after earlier blocks included: a code that is set has that value in the end.
    """

    def __init__(self, sites: Sequence[Steering]) -> None:
        """Put them together, in any order.

        Args:
            sites: one for each SAE (and place), all on one backbone and read by one probe.

        Raises:
            UserError: they differ in the backbone or in what is read, or two put reconstructions in the same place.

        """
        one = sites[0]
        for site in sites:
            if (site.backbone.info, site.probe_layer, site.token) != (one.backbone.info, one.probe_layer, one.token):
                raise UserError("steer: SAEs are edited together on one backbone, and read by one probe")
        replaced = [(site.layer, site.place) for site in sites if not site.keep_error]
        if twice := [place for place in replaced if replaced.count(place) > 1]:
            raise UserError(
                f"steer: two SAEs would replace the {twice[0][1]} after block {twice[0][0]} by their reconstructions; "
                "say keep_error: true for one of them"
            )
        self.sites = list(sites)
        # After one block, those first that replace tokens: the others then edit what stands there.
        order = sorted(range(len(sites)), key=lambda i: (sites[i].layer, sites[i].keep_error))
        self._by_layer = [(layer, list(here)) for layer, here in groupby(order, lambda i: sites[i].layer)]
        self._last = sites[order[-1]]

    def read(self, images: Tensor) -> list[Reading]:
        """Read prepared images, float32 [b, 3, height, width]; one reading for each SAE."""
        with torch.no_grad():
            return self.reading(tokens_after(self._last.backbone, images, self._by_layer[0][0]))

    @torch.no_grad()
    def reading(self, tokens_btd: Tensor) -> list[Reading]:
        """Read the tokens that the first block with an SAE put out, float32 [b, t, d]; one reading for each SAE."""
        found: dict[int, tuple[Tensor, Codes]] = {}
        at = self._by_layer[0][0]
        for layer, here in self._by_layer:
            tokens_btd, codes = self._coded(self._last.backbone.tail(tokens_btd, at + 1, layer), here)
            found |= {i: (tokens_btd, codes[i]) for i in here}
            at = layer
        logits_bc = self._last.logits(tokens_btd)
        return [Reading(*found[i], logits_bc) for i in range(len(self.sites))]

    @torch.no_grad()
    def edit(self, readings: Sequence[Reading], edits: Sequence[Sequence[Edit]]) -> Tensor:
        """Return the logits [b, c] after all edits; blocks run from the first edited one on.

        Args:
            readings: what `read` gave; left as they are.
            edits: of each SAE, in their order; any may have none.

        """
        asked = {i for i, some in enumerate(edits) if some}
        blocks = list(dropwhile(lambda block: not asked & set(block[1]), self._by_layer))
        if not blocks:
            return readings[0].logits_bc.clone()
        (at, first), *later = blocks
        tokens_btd = self._changed(readings[first[0]].tokens_btd, {i: readings[i] for i in first}, edits)
        for layer, here in later:
            some = [i for i in here if i in asked or not self.sites[i].keep_error]
            tokens_btd, codes = self._coded(self._last.backbone.tail(tokens_btd, at + 1, layer), some)
            anew = {i: Reading(tokens_btd, codes[i], readings[i].logits_bc) for i in some}
            tokens_btd, at = self._changed(tokens_btd, anew, edits), layer
        return self._last.logits(tokens_btd)

    def _coded(self, tokens_btd: Tensor, here: Sequence[int]) -> tuple[Tensor, dict[int, Codes]]:
        """Return the tokens that edits after a block start from, and the codes of some of its SAEs."""
        codes: dict[int, Codes] = {}
        for i in here:
            tokens_btd, codes[i] = self.sites[i].coded(tokens_btd)
        return tokens_btd, codes

    def _changed(self, tokens_btd: Tensor, readings: Mapping[int, Reading], edits: Sequence[Sequence[Edit]]) -> Tensor:
        """Return what a block puts out once all edits there are added."""
        tokens_btd = tokens_btd.clone()
        for i, reading in readings.items():
            tokens_btd[:, self.sites[i].edited] += self.sites[i].change(reading, edits[i])
        return tokens_btd


def like_norm(delta_bpd: Tensor, model_bpd: Tensor) -> Tensor:
    """Return `delta_bpd`, rescaled image by image to the Frobenius norm of `model_bpd`; zero stays zero."""
    is_norm, wanted = (x.flatten(1).norm(dim=1)[:, None, None] for x in (delta_bpd, model_bpd))
    return delta_bpd * torch.where(is_norm > 0, wanted / is_norm.clamp_min(1e-30), 0)


def along(direction_bd: Tensor, model_bpd: Tensor) -> Tensor:
    """Return unit directions [b, d], on each token as long as `model_bpd` is there."""
    norm_bp1: Tensor = model_bpd.norm(dim=2, keepdim=True)
    return norm_bp1 * direction_bd[:, None]
