"""The lines of the contract of plugins, and what is said when one is broken."""

from typing import Any

import torch
from torch import Tensor

CONTRACT = {
    "entry.name": 'a config class says its name: use: Literal["name"] = "name"',
    "entry.docstring": "a config class has a docstring",
    "entry.sentences": "each setting has a sentence below it",
    "entry.frozen": "a config class is frozen, as Entry is",
    "entry.json": "dumped as JSON and read again, the settings and their content are the same",
    "entry.light": "importing the module brings in nothing heavier than torch and numpy",
    "backbone.describe": "describe() gives sizes above 0 without loading weights",
    "backbone.prefix": "prefix tokens are cls, dist or register, and cls comes first",
    "backbone.type": "build() returns a Backbone",
    "backbone.info": "info is what describe() says",
    "backbone.blocks": "there are n_blocks blocks",
    "backbone.eval": "build() returns it in eval mode",
    "backbone.frozen": "build() freezes the weights",
    "backbone.prepare": "prepare() gives float32 [3, height, width], all finite, of one shape for all images",
    "backbone.prepared": "prepared again, an image is the same",
    "backbone.view": "view() is RGB and has the aspect of the grid",
    "backbone.embed": "embed() gives [batch, token, d_model] in float32",
    "backbone.shapes": "after each block tokens are [batch, token, d_model], float32 and finite",
    "backbone.tail": "tail() from any block on gives what the whole pass gives",
    "backbone.cls": "cls_after() gives [CLS] of what the block puts out",
    "backbone.untouched": "tail() leaves its input as it was",
    "backbone.passes": "two passes give the same",
    "backbone.again": "built again, it gives the same",
    "backbone.batch": "an image's tokens do not depend on the others of its batch",
    "backbone.embedding": "embedding() gives [batch, d_embed]",
    "backbone.gradient": "gradients flow through tail()",
    "dataset.images": "it has images",
    "dataset.classes": "classes are names, no two the same",
    "dataset.keys": "keys are unique",
    "dataset.labels": "a label is -1 or the index of a class",
    "dataset.splits": "a split is train, valid or test",
    "dataset.order": "opened again, it has the same images with the same labels and splits in the same order",
    "dataset.lazy": "no image is opened before load()",
    "dataset.load": "load() gives a PIL image",
    "dataset.loaded": "loaded again, an image is the same",
    "dataset.spawn": "load() can be handed to a spawned worker, and gives the same image there",
    "sae.type": "build() returns a Sae",
    "sae.state": "its state holds W_enc, b_enc, W_dec, b_dec, mean and scale, shaped by d_model and d_sae",
    "sae.seed": "built after the same seed, it is the same",
    "sae.terms": "each term of the loss is one finite number",
    "sae.fired": "fired_s counts tokens, an integer for each feature, no more than there are tokens",
    "sae.gradient": "the loss has a gradient, and it is finite",
    "sae.oracle": "in float64 the loss and its gradients are those of a dense computation",
    "sae.codes": "codes are int64 indices in 0..d_sae-1 and values of one shape, zero or larger",
    "sae.fires": "some feature fires",
    "sae.sparse": "encode() scattered is activate(), each feature once",
    "sae.select": "fire() gives 0 where select() selects none",
    "sae.dense": "dense() is activate() of the pre-activations",
    "sae.decode": "decode(encode(x)) is what the SAE gives for x, as is dense decoding",
    "sae.batch": "in eval mode a token's codes do not depend on its batch",
    "sae.empty": "no tokens have no codes",
    "sae.stored": "stored and loaded, it gives the same codes and the same reconstruction",
    "sae.still": "in eval mode nothing changes its state",
    "sae.draws": "a step draws from torch's generator only where `draws` does not say that it does not",
    "sae.stacked": "trained beside others on one stream, it is the one trained alone",
    "sae.planted": "trained on sums of about three planted directions, it has a row near each of them",
    "probe.type": "build() and fit() return a Probe",
    "probe.untouched": "fit() leaves its tokens as they were",
    "probe.logits": "logits are float32 [n, class], all finite, whatever n and the number of classes",
    "probe.learns": "of three clouds six standard deviations apart it reads 90 % right",
    "probe.calibration": "on tokens it was not fitted to, its softmax gives the right class more than chance",
    "probe.again": "fitted again, it is the same",
    "probe.stored": "its state, stored and loaded, gives the same logits",
    "probe.sweep": "fit_many() returns one probe a member, each the one fitted alone",
    "probe.steps": "fit_many() reports its steps, rising to the last",
    "metric.number": "result() gives a float",
    "metric.cuts": "another cut into batches gives the same",
    "stage.methods": "it has methods units() and make()",
    "figure.wants": "wants is a tuple of the stages that it is drawn from",
    "figure.draw": "it has a method draw()",
}
"""What each kind of plugin promises, by the name of the line; `saefw.testing` checks them all."""


def expect(line: str, holds: bool, expected: object, got: object, where: str = "") -> None:
    """Raise AssertionError with the line of the contract that was broken, also under `python -O`.

    Args:
        line: its name.
        holds: whether it is kept.
        expected: what the line asks for.
        got: what came.
        where: of what: an image, a block.

    """
    if not holds:
        place = f"{where}: " if where else ""
        raise AssertionError(f"contract {line}, {CONTRACT[line]}: {place}expected {expected}, got {got}")


def equal(line: str, got: Tensor, expected: Tensor, where: str = "") -> None:
    """Expect two tensors to be the same in every bit."""
    if not torch.equal(got, expected):
        _differ(line, got, expected, where)


def near(line: str, got: Tensor, expected: Tensor, where: str = "", allowed: float = 1e-4) -> None:
    """Expect two tensors to agree up to the rounding of sums, relative to the largest number."""
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    if got.shape != expected.shape or not bool(((got - expected).abs() <= allowed * scale).all()):
        _differ(line, got, expected, where)


def _differ(line: str, got: Tensor, expected: Tensor, where: str) -> None:
    """Say of what shape two tensors are, or where they differ most."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        expect(line, False, described(expected), described(got), where)
    flat = (got.double() - expected.double()).abs().nan_to_num(torch.inf).flatten()
    place = [int(i) for i in torch.unravel_index(flat.argmax(), got.shape)]
    expect(line, False, f"{float(expected[tuple(place)]):.6g} at {place}", f"{float(got[tuple(place)]):.6g}", where)


def described(x: Any) -> str:
    """Return the type and shape of a tensor, or the type of anything else."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    return type(x).__name__


def stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state as safetensors brings it back."""
    from safetensors.torch import load, save

    return load(save({name: x.contiguous() for name, x in state.items()}))
