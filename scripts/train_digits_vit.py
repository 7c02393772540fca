"""Trains the small vision transformer of the embedded experiment on scikit-learn's digits and writes its weights.

The result is `weights.safetensors` and, beside it, `weights.json`: how the weights came about and how good they are.
Only the train split is learnt from. The number of epochs is fixed beforehand and the last weights are kept; the valid
and test accuracies are measured once, at the end, and choose nothing.

    python scripts/train_digits_vit.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import sklearn
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from saefw.plugin import mend_torchvision
from saefw_digits import Digits

OUT = Path(__file__).resolve().parents[1] / "plugins" / "models" / "saefw_digits_vit"

ARCHITECTURE: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "in_chans": 3,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "class_token": True,
    "global_pool": "token",
}
"""Arguments of timm's `VisionTransformer`: 8 x 8 patches and one [CLS] token, 0.3 M parameters."""


def digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns images [N, 3, 32, 32] in [0, 1] and labels [N] of each split, as the `digits` plugin has them."""
    dataset = Digits().build(Path())
    pixels: dict[str, list[np.ndarray[Any, Any]]] = {"train": [], "valid": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for i in range(len(dataset)):
        example = dataset[i]
        pixels[example.split].append(np.asarray(example.load()))
        labels[example.split].append(example.label)
    return {
        name: (torch.from_numpy(np.stack(pixels[name])).permute(0, 3, 1, 2).float() / 255, torch.tensor(labels[name]))
        for name in pixels
    }


def prepare(pixels: torch.Tensor) -> torch.Tensor:
    """Maps pixels from [0, 1] to what the model expects."""
    return (pixels - 0.5) / 0.5


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turns, scales, shears and shifts each image a little; what enters from outside is background (0)."""
    n = len(pixels)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    angle, shear = uniform(-12, 12) * math.pi / 180, uniform(-0.15, 0.15)
    scale_x, scale_y = uniform(0.85, 1.15), uniform(0.85, 1.15)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, uniform(-0.15, 0.15)], dim=1),
        torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, uniform(-0.15, 0.15)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@torch.no_grad()
def accuracy(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the share of images whose highest logit is their label's."""
    model.eval()
    return float((model(prepare(pixels)).argmax(dim=1) == labels).double().mean())


def train(
    splits: dict[str, tuple[torch.Tensor, torch.Tensor]],
    epochs: int,
    batch_size: int,
    lr: float,
    decay: float,
    seed: int,
) -> nn.Module:
    """Fits a model to the train split: AdamW, one learning-rate cycle, cross-entropy with smoothed labels."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model: nn.Module = VisionTransformer(**ARCHITECTURE)
    pixels, labels = splits["train"]
    steps = len(pixels) // batch_size
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * steps, pct_start=0.15)
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        order = torch.randperm(len(pixels), generator=generator)
        for batch in order[: steps * batch_size].view(steps, batch_size):
            logits = model(prepare(augment(pixels[batch], generator)))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 10 == 0 or epoch == epochs:
            print(f"epoch {epoch:4d}  loss {total / steps:.4f}", flush=True)
    return model.eval()


def main() -> None:
    """Reads the options, trains, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to (default: the plugin's)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    mend_torchvision()
    import timm

    splits = digits()
    start = time.perf_counter()
    model = train(splits, options.epochs, options.batch_size, options.lr, options.weight_decay, options.seed)
    seconds = time.perf_counter() - start
    accuracies = {name: round(accuracy(model, *split), 4) for name, split in splits.items()}
    print(accuracies)

    options.out.mkdir(parents=True, exist_ok=True)
    weights = options.out / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
    record = {
        "architecture": {"class": "timm.models.vision_transformer.VisionTransformer", **ARCHITECTURE},
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": {
            "source": "sklearn.datasets.load_digits",
            "split": "by sha256 of 'saefw-digits:<key>' within each class: 2/9 test, 1/9 valid, the rest train",
            "examples": {name: len(labels) for name, (_, labels) in splits.items()},
            "prepare": "32 x 32, bicubic, RGB; (x - 0.5) / 0.5",
        },
        "recipe": {
            "learnt_from": "train",
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "optimizer": "AdamW",
            "peak_lr": options.lr,
            "schedule": "one cycle, 15 % warm-up, cosine",
            "weight_decay": options.weight_decay,
            "clip_grad_norm": 1.0,
            "label_smoothing": 0.05,
            "augmentation": "affine: turn 12 degrees, scale 15 %, shear 0.15, shift 7.5 % of the side",
            "kept": "the weights of the last epoch",
            "seed": options.seed,
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
        },
        "accuracy": accuracies,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "scikit-learn": sklearn.__version__,
            "pillow": PIL.__version__,
            "numpy": np.__version__,
        },
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (options.out / "weights.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{weights}  {weights.stat().st_size / 1e6:.2f} MB  {seconds:.0f} s")


if __name__ == "__main__":
    main()
