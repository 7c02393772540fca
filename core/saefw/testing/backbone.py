"""What is checked of a backbone.

Shapes: b batch, t n_tokens, d d_model, e d_embed.
"""

from typing import get_args

import numpy as np
import torch
from torch import Tensor

from saefw.blocks import edited_tail, outputs, tokens_after
from saefw.plugin import Backbone, BackboneConfig, Prefix
from saefw.testing.contract import described, equal, expect, near
from saefw.testing.entry import check_entry


def check_backbone(config: BackboneConfig, device: str = "cpu") -> None:
    """Check a backbone: shapes, dtypes, preprocessing, that it gives the same again, and that its tail is the whole."""
    check_entry(config)
    info = config.describe()
    expect("backbone.describe", min(info.d_model, info.n_blocks, *info.grid) > 0 <= info.d_embed, "sizes", info)
    named = set(info.prefix) <= set(get_args(Prefix)) and "cls" not in info.prefix[1:]
    expect("backbone.prefix", named, get_args(Prefix), info.prefix)
    backbone = config.build(device)
    expect("backbone.type", isinstance(backbone, Backbone), "a Backbone", type(backbone).__name__)
    expect("backbone.info", backbone.info == info, info, backbone.info)
    expect("backbone.blocks", len(backbone.blocks) == info.n_blocks, info.n_blocks, len(backbone.blocks))
    training = [name or "itself" for name, module in backbone.named_modules() if module.training]
    expect("backbone.eval", not training, "no module in training mode", ", ".join(training[:3]))
    learning = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    expect("backbone.frozen", not learning, "no parameter with a gradient", ", ".join(learning[:3]))

    images = _check_images(backbone).to(device)
    whole_btd = _check_blocks(backbone, images)
    equal("backbone.passes", backbone(images), whole_btd)
    equal("backbone.again", config.build(device)(images), whole_btd)
    near("backbone.batch", backbone(images[:1]), whole_btd[:1])
    if info.d_embed:
        embedding_be, shape = backbone.embedding(whole_btd), (len(images), info.d_embed)
        expect("backbone.embedding", embedding_be.shape == shape, list(shape), list(embedding_be.shape))
    edited_btd = tokens_after(backbone, images, 0).clone().requires_grad_()
    tail_btd = backbone.tail(edited_btd, 1)
    expect("backbone.gradient", tail_btd.requires_grad, "an output with a gradient", "one that is detached")
    (gradient_btd,) = torch.autograd.grad(tail_btd.square().sum(), edited_btd)
    flows = bool(gradient_btd.isfinite().all() and gradient_btd.any())
    expect("backbone.gradient", flows, "finite numbers, not all 0", f"up to {float(gradient_btd.abs().max()):g}")


def _check_blocks(backbone: Backbone, images: Tensor) -> Tensor:
    """Check what each block puts out, and what a pass makes of it; return what the last puts out [b, t, d]."""
    info = backbone.info
    embedded_btd = backbone.embed(images)
    whole_btd: Tensor = backbone(images)
    wanted = f"float32 {[len(images), info.n_tokens, info.d_model]}"
    expect("backbone.embed", described(embedded_btd) == wanted, wanted, described(embedded_btd))
    every = outputs(backbone, images, range(info.n_blocks))
    for layer, tokens_btd in every.items():
        where = f"after block {layer}"
        expect("backbone.shapes", described(tokens_btd) == wanted, wanted, described(tokens_btd), where)
        finite = bool(tokens_btd.isfinite().all())
        expect("backbone.shapes", finite, "finite numbers", "NaN or infinity", where)
        near("backbone.passes", tokens_after(backbone, images, layer), tokens_btd, where)
        before_btd = tokens_btd.clone()
        near("backbone.tail", edited_tail(backbone, tokens_btd, layer), whole_btd, where)
        if layer and info.has_cls:
            near("backbone.cls", backbone.cls_after(every[layer - 1], layer), tokens_btd[:, 0], where)
        equal("backbone.untouched", tokens_btd, before_btd, where)
    return whole_btd


def _check_images(backbone: Backbone) -> Tensor:
    """Prepare images of several sizes and modes; return them, float32 [b, 3, height, width]."""
    from PIL import Image

    rng = np.random.default_rng(0)
    photos = [
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        for shape in ((61, 83, 3), (90, 47, 3), (40, 40), (33, 70, 4))
    ]
    rows, columns = backbone.info.grid
    prepared: list[Tensor] = []
    for photo in photos:
        what = f"an image of mode {photo.mode}, {photo.width} x {photo.height}"
        x = backbone.prepare(photo)
        fits = x.dtype == torch.float32 and x.ndim == 3 and len(x) == 3
        expect("backbone.prepare", fits, "float32 [3, height, width]", described(x), what)
        expect("backbone.prepare", bool(x.isfinite().all()), "finite numbers", "NaN or infinity", what)
        if prepared:
            expect("backbone.prepare", x.shape == prepared[0].shape, list(prepared[0].shape), list(x.shape), what)
        equal("backbone.prepared", backbone.prepare(photo), x, what)
        view = backbone.view(photo)
        expect("backbone.view", view.mode == "RGB", "RGB", view.mode, what)
        off = view.width / view.height / (columns / rows)
        expect("backbone.view", 0.98 < off < 1.02, f"that of {rows} x {columns} patches", view.size, what)
        prepared.append(x)
    return torch.stack(prepared)
