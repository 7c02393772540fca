"""Watching and editing blocks, against timm's own forward pass and forward hooks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyBackbone, TinySet, TinyVit
from torch import Tensor

from saefw.blocks import edited_tail, outputs, resolve, tokens_after
from saefw.errors import UserError


@pytest.fixture(scope="module")
def vit() -> TinyBackbone:
    return TinyVit().build("cpu")


@pytest.fixture(scope="module")
def images(vit: TinyBackbone) -> Tensor:
    dataset = TinySet().build(Path())
    return torch.stack([vit.prepare(dataset[i].load()) for i in range(4)])


def hooked(vit: TinyBackbone, images: Tensor) -> list[Tensor]:
    """What timm's forward pass gives to forward hooks on its blocks."""
    found: list[Tensor] = []
    handles = [block.register_forward_hook(lambda module, args, out: found.append(out)) for block in vit.blocks]
    model: Any = vit.model
    model.forward_features(images)
    for handle in handles:
        handle.remove()
    return found


def test_layer_is_the_output_of_the_block(vit: TinyBackbone, images: Tensor) -> None:
    truth = hooked(vit, images)
    assert len(truth) == 3
    found = outputs(vit, images, [2, 0])
    assert sorted(found) == [0, 2]
    for layer in (0, 2):
        assert torch.equal(found[layer], truth[layer])
    for layer in range(3):
        assert torch.equal(tokens_after(vit, images, layer), truth[layer])
    assert not torch.equal(truth[0], truth[1])


def test_blocks_run_once_and_stop_after_the_last(vit: TinyBackbone, images: Tensor) -> None:
    calls: list[int] = []
    handles = [
        block.register_forward_hook(lambda module, args, out, number=number: calls.append(number))
        for number, block in enumerate(vit.blocks)
    ]
    outputs(vit, images, [1, 0, 1])
    for handle in handles:
        handle.remove()
    assert calls == [0, 1]


def test_tail_goes_on_from_an_edit(vit: TinyBackbone, images: Tensor) -> None:
    whole = vit(images)
    for layer in range(3):
        tokens = tokens_after(vit, images, layer)
        assert torch.equal(edited_tail(vit, tokens, layer), whole)
        assert not torch.allclose(edited_tail(vit, tokens + torch.arange(16.0), layer), whole)


def test_resolve() -> None:
    assert [resolve(layer, 3) for layer in (-3, -1, 0, 2)] == [0, 2, 0, 2]
    for layer in (3, -4):
        with pytest.raises(UserError) as told:
            resolve(layer, 3)
        assert str(told.value) == f"layer {layer}: there are 3 blocks, 0 to 2, or -3 to -1 from the end"
