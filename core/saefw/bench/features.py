"""How fast features are counted and ranked, beside the encoder that they are counted after."""

import shutil
from typing import Any

import torch

from saefw import heap
from saefw.bench.frame import Bench, at_least
from saefw.catalog import Catalog
from saefw.firing import codes
from saefw.sae import Sae
from saefw.tally import DENSE, Sizes, Tally, feed

EXPANSION, K = 32, 32
PATCHES, CLASSES, TOP = 196, 1000, 16
SIZE_MB = 40


def bench(bench: Bench) -> None:
    """Measure the pass of `visuals` at two sizes of patches, and on [CLS] alone."""
    with heap.kept():  # as in a stage
        _bench(bench)


def _bench(bench: Bench) -> None:
    for d_model, n_patches in ((192, PATCHES), (768, PATCHES), (192, 1)):
        n = max(1, (bench.size_mb or SIZE_MB) * 10**6 // (4 * n_patches * d_model))
        torch.manual_seed(0)
        config: Any = Catalog().lookup("saes")["topk"]
        sae: Sae = config(k=K, expansion=EXPANSION).build(d_model).eval()
        x_epd, label_e = torch.randn(n, n_patches, d_model), torch.randint(0, CLASSES, (n,))
        of = f"{n_patches} patches" if n_patches > 1 else "[CLS]"
        bench.part(f"{n:,} images, {of}; d_model {d_model} to {sae.d_sae:,} features, k {K}; {CLASSES:,} classes")
        _pass(bench, sae, x_epd, label_e)


def _pass(bench: Bench, sae: Sae, x_epd: torch.Tensor, label_e: torch.Tensor) -> None:
    """Compare the encoder alone with the whole pass; each begins anew, when every image is among the strongest."""
    n, n_patches, d_model = x_epd.shape
    x_nd, at_once = x_epd.view(-1, d_model), max(1, DENSE // (n_patches * sae.d_sae)) * n_patches
    sizes = Sizes(sae.d_sae, n_patches, CLASSES, TOP)
    folder, tallies = bench.folder / "tally", list[Tally]()

    def fresh() -> None:
        tallies.clear()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        tallies.append(Tally(sizes, folder))

    @torch.no_grad()
    def product() -> None:
        for first in range(0, len(x_nd), at_once):
            sae.pre(x_nd[first : first + at_once])

    @torch.no_grad()
    def encode() -> None:
        for first in range(0, len(x_nd), at_once):
            codes(sae, x_nd[first : first + at_once])

    subjects = {
        "product with W_enc": product,
        "encoder": encode,
        "features counted and ranked": lambda: feed(tallies[0], sae, torch.arange(n), label_e, x_epd),
    }
    taken = bench.seconds(f"d_model {d_model}", subjects, before=fresh)
    rate = {name: n * n_patches / seconds for name, seconds in taken.items()}
    bench.row("product with W_enc", rate["product with W_enc"], "tokens/s")
    bench.row("encoder", rate["encoder"], "tokens/s", "product with W_enc")
    bench.row("features counted and ranked", rate["features counted and ranked"], "tokens/s", "encoder", at_least(0.7))
