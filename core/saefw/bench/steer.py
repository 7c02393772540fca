"""How long one further edit takes, beside the bare blocks that it runs.

A plain vision transformer of random weights, as large as a ViT-B/16; an SAE on the output of its last block but one.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from PIL import Image
from torch import Tensor, nn

from saefw.bench.frame import Bench, at_least, at_most
from saefw.chance import seeded
from saefw.plugin import Backbone, BackboneInfo, Probe
from saefw.sae import Entries, Sae, largest
from saefw.steering import Edit, Steering

D_MODEL, N_BLOCKS, GRID, PATCH = 768, 12, 14, 16
K, EXPANSION, CLASSES = 32, 16, 1000
BATCH = 64


class Plain(Backbone):
    """A vision transformer of torch's own layers."""

    def __init__(self) -> None:
        """Draw its weights."""
        super().__init__()
        self.info = BackboneInfo(d_model=D_MODEL, n_blocks=N_BLOCKS, grid=(GRID, GRID), prefix=("cls",))
        self.patches = nn.Conv2d(3, D_MODEL, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, D_MODEL))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                D_MODEL, D_MODEL // 64, 4 * D_MODEL, dropout=0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(N_BLOCKS)
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Its layers."""
        return list(self.layers)

    def embed(self, images: Tensor) -> Tensor:
        """Return patches behind [CLS]."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(len(images), -1, -1), patches], dim=1)

    def prepare(self, image: Image.Image) -> Tensor:
        """Nothing is prepared: images are noise."""
        raise NotImplementedError

    def view(self, image: Image.Image) -> Image.Image:
        """Nothing is shown."""
        raise NotImplementedError


class Top(Sae):
    """An SAE of which the K largest features fire."""

    def select(self, pre_ns: Tensor) -> Entries:
        """Return the K largest of each token."""
        return largest(pre_ns, K)


def bench(bench: Bench) -> None:
    """Measure one image that is edited again and again, and a batch."""
    with seeded(0, 0):
        backbone = Plain().eval().requires_grad_(False)
        sae = Top(D_MODEL, EXPANSION * D_MODEL).eval().requires_grad_(False)
        probe = cast(Probe, nn.Linear(D_MODEL, CLASSES).requires_grad_(False))
        images = torch.randn(1, 3, GRID * PATCH, GRID * PATCH)
        tokens_btd = torch.randn(BATCH, GRID**2 + 1, D_MODEL)
    layer = N_BLOCKS - 2
    steering = Steering(backbone, sae, probe, layer, N_BLOCKS - 1)
    one, many = steering.read(images), steering.reading(tokens_btd)
    features = one.codes.indices[0, :3].tolist()
    edits = [Edit(feature, "set", 2.0) for feature in features]
    features_bf, amounts_bf = torch.tensor(features).expand(BATCH, -1), torch.full((BATCH, 3), 2.0)

    @torch.no_grad()
    def bare(tokens: Tensor) -> Tensor:
        return backbone.tail(tokens, N_BLOCKS - 1)

    def batch() -> Tensor:
        return steering.after(many, steering.delta(many, features_bf, amounts_bf, "set")).softmax(dim=1)

    alone = bench.seconds(
        "one image",
        {
            "bare": lambda: bare(one.tokens_btd),
            "edit": lambda: steering.edit(one, edits).softmax(dim=1),
            "read": lambda: steering.read(images),
        },
    )
    together = bench.seconds("a batch", {"bare": lambda: bare(tokens_btd), "edit": batch})
    size = f"d_model {D_MODEL}, {N_BLOCKS} blocks, {GRID**2 + 1} tokens, {sae.d_sae:,} features, {CLASSES:,} classes"
    bench.part(f"One image, float32: {size}")
    bench.row("the bare last block", 1e3 * alone["bare"], "ms")
    bench.row("one more edit", 1e3 * alone["edit"], "ms", "the bare last block", at_most(1.5))
    bench.row("one more edit, in all", 1e3 * alone["edit"], "ms", bound=at_most(60, "value"))
    bench.row("first reading", 1e3 * alone["read"], "ms")
    bench.part(f"{BATCH} images at a time, float32")
    bench.row("bare last block", BATCH / together["bare"], "images/s")
    bench.row("edited", BATCH / together["edit"], "images/s", "bare last block", at_least(0.9))
    # What an edit must not change: nothing is compared where the two do not say the same.
    same = (steering.edit(one, [Edit(f, "add", 0.0) for f in features]) - one.logits_bc).abs().max().item()
    bench.row("logits of an edit by nothing", same if math.isfinite(same) else 1e9, "off", bound=at_most(1e-5, "value"))
