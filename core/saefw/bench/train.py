"""What a training step costs beside the product with W_enc.

Weights stay as they are while it is measured, so that as many features are active in the last step as in the first.
"""

import ctypes
from collections.abc import Callable, Iterator
from itertools import cycle, islice

import torch
from torch import Tensor

from saefw import heap
from saefw.abreast import Abreast
from saefw.acts import Stats
from saefw.bench.frame import Bench, Bound, at_most, memory, peak_memory
from saefw.catalog import Catalog
from saefw.near import has_bfloat16
from saefw.plugin import SaeConfig, Unit
from saefw.sparse import Scratch
from saefw.training import Training

BATCH, EXPANSION, K = 4096, 32, 32

STEPS: tuple[tuple[str, dict[str, object], tuple[float, float]], ...] = (
    ("topk", {"k": K}, (1.35, 2.2)),
    ("batchtopk", {"k": K}, (1.35, 2.2)),
    ("matryoshka", {"k": K, "keep": "topk"}, (1.5, 2.6)),
    ("relu", {"aux": 1 / 32}, (1.6, 2.6)),
    ("jumprelu", {"aux": 1 / 32}, (1.6, 2.6)),
)
"""Variants, their settings, and by how much their step may take longer than the product, at each width."""

ACTIVE = 0.01
"""Which share of the features is active on a token, in variants that do not choose it."""

DEAD = 0.1
MEMBERS = 4
WIDTHS = {768: 4.0, 192: 3.5}
"""d_model, and how many times longer the step of four members may take than that of one."""

OF_BFLOAT16 = (0.6, 1.6)
"""And that of topk in bfloat16, where the processor multiplies in it; elsewhere it is left out."""

PRODUCT, PLAIN = "product with W_enc", "dense topk"


def bench(bench: Bench) -> None:
    """Measure the step of each variant that is installed, and the memory it takes."""
    with heap.kept():
        _bench(bench)


def _bench(bench: Bench) -> None:
    saes = Catalog().lookup("saes")
    for which, (d_model, of_members) in enumerate(WIDTHS.items()):
        d_sae = EXPANSION * d_model
        x_nd = torch.randn(BATCH, d_model, generator=torch.Generator().manual_seed(0))
        recorded_nd = x_nd.half()
        bench.part(f"A step: d_model {d_model}, d_sae {d_sae:,}, {BATCH:,} tokens, k {K}; of relus {ACTIVE:.0%} active")
        subjects: dict[str, Callable[[], object]] = {PRODUCT: _product(x_nd, d_sae), PLAIN: _plain(x_nd, d_sae)}
        bounds: dict[str, tuple[str, Bound]] = {}
        topk = [_training(saes["topk"], {"k": K, "seed": seed}, x_nd) for seed in range(MEMBERS)]
        with Abreast((), BATCH) as one, Abreast(topk, BATCH) as several:
            for use, settings, limits in STEPS:
                if use in saes:
                    # One after the other: where its weights lie in memory makes a step of one a little quicker.
                    turns = cycle(topk if use == "topk" else [_training(saes[use], settings, x_nd)])
                    for name, dead in ((use, 0.0), (f"{use}, {DEAD:.0%} dead", DEAD)):
                        subjects[name] = _step(one, turns, recorded_nd, dead)
                        bounds[name] = PRODUCT, at_most(limits[which])
            if has_bfloat16():
                training = _training(saes["topk"], {"k": K, "precision": "bfloat16"}, x_nd)
                subjects["topk, bfloat16"] = _step(one, cycle([training]), recorded_nd)
                bounds["topk, bfloat16"] = PRODUCT, at_most(OF_BFLOAT16[which])
            subjects[f"topk, {MEMBERS} members"] = _step(several, cycle(topk), recorded_nd, n=MEMBERS)
            bounds[f"topk, {MEMBERS} members"] = "topk", at_most(of_members)
            seconds = bench.seconds(f"d_model {d_model}", subjects)
        for name, took in seconds.items():
            bench.row(name, 1000 * took, "ms", *bounds.get(name, ()))
        bench.part(f"The same, and the memory beyond weights, gradients and Adam's moments; d_model {d_model}")
        for name, took in seconds.items():
            members = MEMBERS if name.endswith("members") else 1
            bench.row(name, members * BATCH / took, "vectors/s", "" if name == PRODUCT else PRODUCT)
        if memory() is not None:
            bench.row("pre-activations", BATCH * d_sae * 4 / 1e6, "MB")
            bench.row("topk", _memory(topk[0], recorded_nd) / 1e6, "MB", "pre-activations", at_most(1.3))


def _training(cls: type, settings: dict[str, object], x_nd: Tensor) -> Training:
    """Return a training whose weights do not move, and of whose features as many are active as is wanted."""
    config: SaeConfig = cls(**{"expansion": EXPANSION, "lr": 1e-12, **settings})
    d_model = x_nd.shape[1]
    stats = Stats(torch.zeros(d_model), torch.ones(d_model), 1.0, 0.0, BATCH)
    training = Training(Unit("train", {}, given={"sae": config}), d_model, stats, 1 << 40, "cpu")
    sae = training.sae
    if "k" not in settings:
        with torch.no_grad():
            over_ns = sae.pre(x_nd[:64]) - sae.edge()
            sae.b_enc -= over_ns.flatten().sort(descending=True).values[int(ACTIVE * over_ns.numel())]
    return training


def _step(
    abreast: Abreast, turns: Iterator[Training], x_nd: Tensor, dead: float = 0.0, n: int = 1
) -> Callable[[], object]:
    """Return a step of the next n, on tokens as they were recorded, in which a share of the features is dead."""

    def step() -> None:
        trainings = list(islice(turns, n))
        for training in trainings:
            training.since_s.zero_()
            training.since_s[: int(dead * training.sae.d_sae)] = 1 << 50
        abreast.step(trainings, x_nd, 1 << 50)

    return step


def _product(x_nd: Tensor, d_sae: int) -> Callable[[], object]:
    """Return the product alone, into memory that is there already."""
    W_enc, b_enc = torch.randn(x_nd.shape[1], d_sae), torch.zeros(d_sae)
    into_ns = torch.empty(len(x_nd), d_sae)
    return lambda: torch.addmm(b_enc, x_nd, W_enc, out=into_ns)


def _plain(x_nd: Tensor, d_sae: int) -> Callable[[], object]:
    """Return a step of TopK as one writes it first: dense codes, autograd, Adam as it comes."""
    W_enc = (torch.randn(x_nd.shape[1], d_sae) / 28).requires_grad_()
    W_dec, b_enc = W_enc.detach().T.clone().requires_grad_(), torch.zeros(d_sae, requires_grad=True)
    b_dec = torch.zeros(x_nd.shape[1], requires_grad=True)
    adam = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=1e-12)

    def step() -> None:
        pre_ns = (x_nd - b_dec) @ W_enc + b_enc
        top = pre_ns.topk(K, dim=1)
        codes_ns = torch.zeros_like(pre_ns).scatter(1, top.indices, top.values.relu())
        loss = (codes_ns @ W_dec + b_dec - x_nd).square().mean()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()

    return step


def _memory(training: Training, x_nd: Tensor) -> int:
    """Return the most bytes that a step takes beyond weights, gradients and Adam's moments."""
    training.sae.scratch = Scratch()
    # What the C library keeps of memory that was freed would be used first, and not be seen.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    with Abreast((), BATCH) as abreast, peak_memory() as peak:
        _step(abreast, cycle([training]), x_nd)()
    held: int = sum(p.numel() * p.element_size() for p in training.sae.parameters())  # by the gradients
    return peak.bytes - held
