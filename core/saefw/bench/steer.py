"""How long one further edit takes, beside the bare block that it runs.

timm's ViT-B/16 with random weights; an SAE on the output of its last block but one, a probe of [CLS] after the last.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from saefw.bench.frame import Bench, at_least, at_most
from saefw.catalog import Catalog
from saefw.chance import seeded
from saefw.plugin import BackboneConfig, Probe
from saefw.sae import Entries, Sae, largest
from saefw.steering import Edit, Steering

MODEL, SIDE = "vit_base_patch16_224", 224
K, EXPANSION, CLASSES = 32, 16, 1000
BATCH = 64


class Top(Sae):
    """An SAE of which the K largest features fire."""

    def select(self, pre_ns: Tensor) -> Entries:
        """Return the K largest of each token."""
        return largest(pre_ns, K)


def bench(bench: Bench) -> None:
    """Measure one image that is edited again and again, and a batch."""
    config = (
        Catalog().lookup("backbones")["timm"].model_validate({"model": MODEL, "img_size": SIDE, "pretrained": False})
    )
    backbone = cast(BackboneConfig, config).build("cpu")
    d_model, last, n_tokens = backbone.info.d_model, backbone.info.n_blocks - 1, backbone.info.n_tokens
    with seeded(0, 0):
        sae = Top(d_model, EXPANSION * d_model).eval().requires_grad_(False)
        probe = cast(Probe, nn.Linear(d_model, CLASSES).requires_grad_(False))
        images = torch.randn(1, 3, SIDE, SIDE)
        tokens_btd = torch.randn(BATCH, n_tokens, d_model)
    steering = Steering(backbone, sae, probe, last - 1, last)
    one, many = steering.read(images), steering.reading(tokens_btd)
    features = one.codes.indices[0, :3].tolist()
    edits = [Edit(feature, "set", 2.0) for feature in features]
    features_bf, amounts_bf = torch.tensor(features).expand(BATCH, -1), torch.full((BATCH, 3), 2.0)

    @torch.no_grad()
    def bare(tokens: Tensor) -> Tensor:
        return backbone.tail(tokens, last)

    @torch.no_grad()
    def of_cls(tokens: Tensor) -> Tensor:
        return backbone.cls_after(tokens, last)

    def batch() -> Tensor:
        return steering.after(many, steering.delta(many, features_bf, amounts_bf, "set")).softmax(dim=1)

    alone = bench.seconds(
        "one image",
        {
            "bare": lambda: bare(one.tokens_btd),
            "of_cls": lambda: of_cls(one.tokens_btd),
            "edit": lambda: steering.edit(one, edits).softmax(dim=1),
            "read": lambda: steering.read(images),
        },
    )
    together = bench.seconds(
        "a batch", {"bare": lambda: bare(tokens_btd), "of_cls": lambda: of_cls(tokens_btd), "edit": batch}
    )
    size = f"d_model {d_model}, {last + 1} blocks, {n_tokens} tokens, {sae.d_sae:,} features, {CLASSES:,} classes"
    bench.part(f"One image, float32: {size}")
    bench.row("the bare last block", 1e3 * alone["bare"], "ms")
    bench.row("the last block for [CLS] alone", 1e3 * alone["of_cls"], "ms")
    bench.row("one more edit", 1e3 * alone["edit"], "ms", "the bare last block", at_most(1.5))
    bench.row("one more edit, in all", 1e3 * alone["edit"], "ms", bound=at_most(60, "value"))
    bench.row("first reading", 1e3 * alone["read"], "ms")
    bench.part(f"{BATCH} images at a time, float32")
    bench.row("bare last block", BATCH / together["bare"], "images/s")
    bench.row("last block for [CLS] alone", BATCH / together["of_cls"], "images/s")
    bench.row("edited", BATCH / together["edit"], "images/s", "bare last block", at_least(0.9))
    # What must not change: nothing is compared where two ways do not say the same.
    bench.part("Logits")
    same = (steering.edit(one, [Edit(f, "add", 0.0) for f in features]) - one.logits_bc).abs().max().item()
    bench.row("of an edit by nothing", same if math.isfinite(same) else 1e9, "off", bound=at_most(1e-5, "value"))
    whole = (probe(bare(one.tokens_btd)[:, 0]) - one.logits_bc).abs().max().item()
    bench.row("by way of the whole block", whole if math.isfinite(whole) else 1e9, "off", bound=at_most(1e-5, "value"))
