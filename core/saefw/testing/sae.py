"""What is checked of an SAE variant: its codes, its loss, and that it can be stored.

Shapes: n tokens, d d_model, s d_sae, g prefixes.
"""

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from saefw.chance import seeded
from saefw.plugin import SaeConfig, UserError
from saefw.sae import Batch, Loss, Sae, auxk
from saefw.testing.contract import described, equal, expect, near, stored
from saefw.testing.entry import check_entry
from saefw.testing.planted import check_stacked


def check_sae(config: SaeConfig, d_model: int = 16) -> None:
    """Check an SAE variant on made-up tokens: its codes, its loss, its training, and that it can be stored."""
    check_entry(config)
    sae, again = _fresh(config, d_model), _fresh(config, d_model)
    d, s = sae.d_model, sae.d_sae
    wanted = {"W_enc": [d, s], "b_enc": [s], "W_dec": [s, d], "b_dec": [d], "mean": [d], "scale": []}
    state = sae.state_dict()
    for name, shape in wanted.items():
        found = list(state[name].shape) if name in state else "nothing"
        expect("sae.state", found == shape, shape, found, name)
    for name, x in state.items():
        equal("sae.seed", again.state_dict()[name], x, name)

    x_nd = tokens(d)
    _check_loss(sae, sae.normalise(x_nd))
    if type(sae).loss is Sae.loss:
        _check_oracle(sae, sae.normalise(x_nd))
    # A few steps, so that the codes are checked away from the start, where all biases are zero.
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(10):
        optimiser.zero_grad()
        torch.stack(list(sae.loss(sae.normalise(x_nd), _no(s)).terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        sae.settle()
    sae.eval().requires_grad_(False)
    _check_codes(sae, x_nd)

    before = {name: x.clone() for name, x in sae.state_dict().items()}
    again.load_state_dict(stored(before))
    again.eval().requires_grad_(False)
    equal("sae.stored", again.dense(x_nd), sae.dense(x_nd), "codes")
    equal("sae.stored", again(x_nd), sae(x_nd), "reconstruction")
    for name, x in sae.state_dict().items():
        equal("sae.still", x, before[name], name)
    check_stacked(config)


def _check_loss(sae: Sae, z_nd: Tensor) -> None:
    """Check the loss on normalised tokens, with no feature dead and with all."""
    for dead_s in (_no(sae.d_sae), ~_no(sae.d_sae)):
        sae.zero_grad()
        chance = torch.get_rng_state()
        try:
            loss = sae.loss(z_nd, dead_s)
        except UserError as error:
            expect("sae.terms", False, "codes [n, s] and scalars by name", str(error))
            raise
        drew = not torch.equal(torch.get_rng_state(), chance)
        expect("sae.draws", sae.may_draw() or not drew, "no draw", "one")
        for name, term in loss.terms.items():
            good = term.shape == () and bool(term.isfinite())
            expect("sae.terms", good, "a finite number", term.tolist(), f"the term '{name}'")
        fired = loss.fired_s
        counts = fired.shape == (sae.d_sae,) and not fired.is_floating_point() and not fired.requires_grad
        expect("sae.fired", counts, f"int64 {[sae.d_sae]}", described(fired))
        least, most = int(fired.min()), int(fired.max())
        expect("sae.fired", 0 <= least <= most <= len(z_nd), f"0 to {len(z_nd)}", f"{least} to {most}")
        torch.stack(list(loss.terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
        expect("sae.gradient", any(bool(g.any()) for g in gradients.values()), "some that is not 0", "none")
        for name, gradient in gradients.items():
            good = bool(gradient.isfinite().all())
            where = name if good else name + _to_blame(sae, z_nd, dead_s)
            expect("sae.gradient", good, "finite numbers", "NaN or infinity", where)


def _to_blame(sae: Sae, z_nd: Tensor, dead_s: Tensor) -> str:
    """Say which token has, alone, a gradient that is not finite, if one has; most often that of zeros."""
    for i in range(len(z_nd)):
        sae.zero_grad()
        torch.stack(list(sae.loss(z_nd[i : i + 1], dead_s).terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        if not all(bool(_gradient(p).isfinite().all()) for p in sae.parameters()):
            return f", by token {i} alone" + (", which is all zeros" if not z_nd[i].any() else "")
    return ""


def _check_oracle(sae: Sae, z_nd: Tensor) -> None:
    """Compare the loss and its gradients with those of plain autograd on all pre-activations, in float64."""
    z_nd = z_nd.double()
    for n_dead in (0, sae.d_sae // 2):
        dead_s = torch.arange(sae.d_sae) < n_dead
        # What a step leaves in buffers must not be found by the other.
        ours, oracle = deepcopy(sae).double(), deepcopy(sae).double()
        with seeded(0, 0):
            loss = ours.loss(z_nd, dead_s)
        with seeded(0, 0):
            wanted = _dense_loss(oracle, z_nd, dead_s)
        where = f"with {n_dead} dead features"
        expect("sae.oracle", loss.terms.keys() == wanted.terms.keys(), list(wanted.terms), list(loss.terms), where)
        for terms in (loss.terms, wanted.terms):
            torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        for name, term in wanted.terms.items():
            near("sae.oracle", loss.terms[name].detach(), term.detach(), f"the term '{name}' {where}", 1e-9)
        equal("sae.oracle", loss.fired_s, wanted.fired_s, f"fired_s {where}")
        gradients = {name: _gradient(p) for name, p in ours.named_parameters()}
        for name, p in oracle.named_parameters():
            near("sae.oracle", gradients[name], _gradient(p), f"the gradient of {name} {where}", 1e-9)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _dense_loss(sae: Sae, z_nd: Tensor, dead_s: Tensor) -> Loss:
    """Return the loss of normalised tokens by the formula alone: nothing is left out, nothing gathered."""
    ends = sae.prefixes()
    pre_ns = (z_nd - sae.b_dec) @ sae.W_enc + sae.b_enc
    codes_ns, W_sd = sae.activate(pre_ns), sae.dictionary()
    error_gnd = torch.stack([z_nd - codes_ns[:, :end] @ W_sd[:end] - sae.b_dec for end in ends])

    def rebuild(values_ns: Tensor) -> Tensor:
        return values_ns @ W_sd.detach() + sae.b_dec.detach()

    terms = sae.terms(Batch(z_nd, pre_ns, codes_ns, slice(None), error_gnd, rebuild))
    if sae.aux:
        n_aux = math.ceil(sae.aux_share * len(z_nd))
        silent_ns = pre_ns[:n_aux].masked_fill(~dead_s, 0).relu()
        top = silent_ns.topk(min(sae.k_aux, sae.d_sae), dim=1)
        aux_nd = torch.zeros_like(silent_ns).scatter(1, top.indices, top.values) @ W_sd
        terms["aux"] = sae.aux * auxk(error_gnd[-1, :n_aux], aux_nd) if dead_s.any() else z_nd.new_zeros(())
    return Loss(terms, (codes_ns > 0).sum(dim=0))


def _check_codes(sae: Sae, x_nd: Tensor) -> None:
    """Check the codes of recorded tokens, sparse against dense, many against one."""
    pre_ns = sae.pre(sae.normalise(x_nd))
    dense_ns = sae.activate(pre_ns)
    codes = sae.encode(x_nd)
    n, k = codes.indices.shape
    expect("sae.codes", codes.values.shape == (n, k), list(codes.indices.shape), list(codes.values.shape), "values")
    expect("sae.codes", codes.indices.dtype == torch.int64, "int64", described(codes.indices), "indices")
    low, high = (int(codes.indices.min()), int(codes.indices.max())) if k else (0, 0)
    expect("sae.codes", 0 <= low <= high < sae.d_sae, f"0 to {sae.d_sae - 1}", f"{low} to {high}", "indices")
    least = min(float(codes.values.min()) if k else 0.0, float(dense_ns.min()))
    expect("sae.codes", least >= 0, "zero or larger", f"{least:g}", "values")
    expect("sae.fires", bool((codes.values > 0).any()), "some code above 0", "none")
    equal("sae.sparse", torch.zeros_like(dense_ns).scatter_add(1, codes.indices, codes.values), dense_ns)
    if type(sae).activate is Sae.activate:
        at = sae.select(pre_ns)
        inside_ns = at.dense(torch.ones(len(at.features_e)), sae.d_sae) > 0
        equal("sae.select", dense_ns, dense_ns.where(inside_ns, 0))
    equal("sae.dense", sae.dense(x_nd), dense_ns)
    near("sae.decode", sae.decode(codes), sae(x_nd), "decode(encode(x))")
    near("sae.decode", sae.reconstruct(dense_ns) * sae.scale + sae.mean, sae(x_nd), "reconstruct(activate())")
    for i in (0, n - 1):
        near("sae.batch", sae.dense(x_nd[i : i + 1]), dense_ns[i : i + 1], f"token {i} alone")
    few = sae.encode(x_nd[:7])
    near("sae.batch", torch.zeros(7, sae.d_sae).scatter_add(1, few.indices, few.values), dense_ns[:7], "7 tokens alone")
    expect("sae.empty", len(sae.encode(x_nd[:0]).values) == 0, 0, len(sae.encode(x_nd[:0]).values))


def _fresh(config: SaeConfig, d_model: int) -> Sae:
    """Build an SAE as the trainer does, with mean and scale unlike their defaults."""
    built: Any = config.build(d_model)
    expect("sae.type", isinstance(built, Sae), "a Sae", type(built).__name__)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sae = config.fresh(d_model)
    sae.mean.copy_(torch.linspace(-1, 2, d_model))
    sae.scale.fill_(1.7)
    return sae


def tokens(d_model: int) -> Tensor:
    """Make up tokens as an SAE sees them: few directions each, off the origin, [200, d]."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_model, d_model, generator=generator)
    codes = torch.rand(200, 4 * d_model, generator=generator) * (
        torch.rand(200, 4 * d_model, generator=generator) < 0.05
    )
    return 1.7 * codes @ directions + torch.linspace(-1, 2, d_model)


def _no(s: int) -> Tensor:
    return torch.zeros(s, dtype=torch.bool)
