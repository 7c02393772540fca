"""The digits and the vision transformer that was trained on them."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from saefw.plugin import Dataset
from saefw_digits import Digits
from saefw_digits_vit import DigitsVit, DigitsVitBackbone


def built() -> tuple[Dataset, DigitsVitBackbone]:
    return Digits().build(Path()), DigitsVit().build("cpu")


def test_split() -> None:
    digits = Digits().build(Path())
    examples = [digits[i] for i in range(len(digits))]
    assert Counter(example.split for example in examples) == {"train": 1199, "valid": 199, "test": 399}
    assert [example.key for example in examples] == [f"digit-{i:04d}" for i in range(1797)]
    for label in range(10):
        ours = [example for example in examples if example.label == label]
        shares = Counter(example.split for example in ours)
        assert abs(shares["test"] / len(ours) - 2 / 9) < 0.01 and abs(shares["valid"] / len(ours) - 1 / 9) < 0.01
        digest = {e.key: hashlib.sha256(b"saefw-digits:" + e.key.encode()).hexdigest() for e in ours}
        largest = {s: max(digest[e.key] for e in ours if e.split == s) for s in ("train", "valid", "test")}
        smallest = {s: min(digest[e.key] for e in ours if e.split == s) for s in ("train", "valid", "test")}
        assert largest["test"] < smallest["valid"] and largest["valid"] < smallest["train"]


def test_image() -> None:
    from sklearn.datasets import load_digits

    image = Digits().build(Path())[7].load()
    assert (image.mode, image.size) == ("RGB", (32, 32))
    pixels = np.asarray(image, dtype=float)
    # Bicubic enlargement keeps the mean of each 4 x 4 cell near the grey value it came from.
    cells = pixels[..., 0].reshape(8, 4, 8, 4).mean((1, 3)) / 255 * 16
    assert np.corrcoef(cells.ravel(), load_digits().images[7].ravel())[0, 1] > 0.97
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()


def test_head_reads_held_out_digits() -> None:
    digits, vit = built()
    test = [digits[i] for i in range(len(digits)) if digits[i].split == "test"]
    logits = vit.classify(torch.stack([vit.prepare(example.load()) for example in test]))
    right = logits.argmax(1) == torch.tensor([example.label for example in test])
    assert len(test) == 399 and right.double().mean() >= 0.975


def test_parts_are_the_model() -> None:
    digits, vit = built()
    images = torch.stack([vit.prepare(digits[i].load()) for i in range(4)])
    assert torch.equal(vit._model(images), vit.classify(images))
    assert torch.equal(vit._model.forward_features(images), vit._model.norm(vit(images)))
    assert images.min() >= -1 and images.max() <= 1
    assert sum(p.numel() for p in vit.parameters()) <= 1_000_000
    assert not vit.training and not any(p.requires_grad for p in vit.parameters())


def test_other_sizes_are_resized() -> None:
    digits, vit = built()
    image = digits[0].load().resize((50, 40)).convert("L")
    assert vit.prepare(image).shape == (3, 32, 32)
    assert (vit.view(image).mode, vit.view(image).size) == ("RGB", (32, 32))


def test_weights_are_part_of_the_address() -> None:
    from importlib.resources import files

    blob = (files("saefw_digits_vit") / "weights.safetensors").read_bytes()
    assert DigitsVit().content() == {
        "use": "digits-vit",
        "revision": 1,
        "weights": hashlib.sha256(blob).hexdigest(),
    }
