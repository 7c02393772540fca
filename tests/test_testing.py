"""Each check of the contract finds what it is there to find."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from pydantic import BaseModel
from tiny import TinyBackbone, TinyImages, TinySet, TinyVit
from torch import Tensor

from saefw.plugin import Example, Probe, ProbeConfig, SaeConfig, Task
from saefw.sae import Batch, Codes, Entries, Loss, Sae, largest
from saefw.testing import (
    check_backbone,
    check_dataset,
    check_entry,
    check_metric,
    check_planted,
    check_probe,
    check_sae,
)


def broken(check: Callable[..., object], *args: object) -> str:
    """Return what a check says of something that breaks the contract."""
    with pytest.raises(AssertionError) as told:
        check(*args)
    assert str(told.value).startswith("contract ")
    return str(told.value).removeprefix("contract ")


class Variant(SaeConfig):
    """An SAE with one fault, or none."""

    use: Literal["variant"] = "variant"

    fault: str = ""
    """Which."""

    def build(self, d_model: int) -> Sae:
        cls = LossSae if self.fault in ("loss", "gradient", "root") else VariantSae
        return cls(d_model, d_model * 4, self.fault)


class VariantSae(Sae):
    """Keeps the 4 largest, wrongly."""

    steps = 0

    def __init__(self, d_model: int, d_sae: int, fault: str) -> None:
        super().__init__(d_model, d_sae)
        self.fault = fault
        self.calls = 0
        self.draws = fault != "draws"

    def select(self, pre_ns: Tensor) -> Entries:
        return largest(pre_ns, min(4, len(pre_ns)) if self.fault == "batch" else 4)

    def fire(self, pre: Tensor, features: Tensor | slice) -> Tensor:
        return pre.clamp(max=-0.1) if self.fault == "negative" else pre.relu()

    def encode(self, x_nd: Tensor) -> Codes:
        codes = super().encode(x_nd)
        return codes._replace(values=2 * codes.values) if self.fault == "twin" else codes

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        if self.fault == "idle":
            return {"mass": batch.codes.sum()}
        if self.fault == "draws":
            torch.rand(())
        factor = 2 if self.fault == "oracle" and batch.codes.ndim == 1 else 1
        return {name: factor * term for name, term in super().terms(batch).items()}

    def settle(self) -> None:
        if self.fault == "shared":
            VariantSae.steps += 1
            self.b_dec.data += VariantSae.steps


class LossSae(VariantSae):
    """Has a loss of its own, which no oracle knows."""

    def loss(self, x_nd: Tensor, dead_s: Tensor) -> Loss:
        loss = super().loss(x_nd, dead_s)
        if self.fault == "loss":
            loss.terms["nan"] = loss.terms["mse"] / 0 * 0
        if self.fault == "gradient":
            return Loss({"mse": torch.zeros((), requires_grad=True)}, loss.fired_s)
        if self.fault == "root":
            loss.terms["root"] = self.pre(x_nd).square().sum(dim=1).sqrt().sum()
        return loss


class Above(SaeConfig):
    """Fires above a half."""

    use: Literal["above"] = "above"

    fault: str = ""
    """What is wrong."""

    def build(self, d_model: int) -> "AboveSae":
        """Return one."""
        return AboveSae(d_model, self.width(d_model), self.fault)


class AboveSae(Sae):
    """Has an edge, and fires below it where it is wrong."""

    def __init__(self, d_model: int, d_sae: int, fault: str) -> None:
        super().__init__(d_model, d_sae)
        self.fault = fault

    def edge(self) -> float:
        return 0.1

    def fire(self, pre: Tensor, features: Tensor | slice) -> Tensor:
        return pre.relu() if self.fault else pre * (pre > 0.1)


def test_sae() -> None:
    check_sae(Variant())
    check_sae(Above())
    assert {
        fault: broken(check_sae, Variant(fault=fault)) for fault in ("loss", "gradient", "root", "negative", "draws")
    } == {
        "loss": "sae.terms, each term of the loss is one finite number: the term 'nan': "
        "expected a finite number, got nan",
        "gradient": "sae.gradient, the loss has a gradient, and it is finite: expected some that is not 0, got none",
        "root": "sae.gradient, the loss has a gradient, and it is finite: W_enc, by token 13 alone, which is all "
        "zeros: expected finite numbers, got NaN or infinity",
        "negative": "sae.codes, codes are int64 indices in 0..d_sae-1 and values of one shape, zero or larger: values: "
        "expected zero or larger, got -0.1",
        "draws": "sae.draws, a step draws from torch's generator only where `draws` does not say that it does not: "
        "expected no draw, got one",
    }
    numbers = {
        "twin": r"sae\.sparse, encode\(\) scattered is activate\(\), each feature once: "
        r"expected X at \[\d+, \d+\], got X",
        "batch": r"sae\.batch, in eval mode a token's codes do not depend on its batch: token 0 alone: "
        r"expected X at \[0, \d+\], got 0",
        "oracle": r"sae\.oracle, in float64 the loss and its gradients are those of a dense computation: "
        r"the term 'mse' with 0 dead features: expected X at \[\], got X",
        "shared": r"sae\.stacked, trained beside others on one stream, it is the one trained alone: "
        r"\w+ after 5 steps: expected X at \[[\d, ]+\], got X",
    }
    for fault, said in numbers.items():
        assert re.fullmatch(said.replace("X", r"-?[\d.e+-]+"), broken(check_sae, Variant(fault=fault))), fault
    assert re.fullmatch(
        r"sae\.select, fire\(\) gives 0 where select\(\) selects none: expected 0 at \[\d+, \d+\], got 0\.\d+",
        broken(check_sae, Above(fault="edge")),
    )


def test_planted() -> None:
    """What learns passes in test_planted; this one learns to be silent."""
    assert re.fullmatch(
        r"sae\.planted, trained on sums of about three planted directions, it has a row near each of them: "
        r"expected a mean cosine above 0\.95, got 0\.\d+, with \d+\.\d features on a token",
        broken(check_planted, Variant(fault="idle")),
    )


class Images(TinySet):
    """A dataset with one fault, or none."""

    fault: str = ""
    """Which."""

    def build(self, base: Path) -> "FaultyImages":
        return FaultyImages(self.fault)


class FaultyImages(TinyImages):
    """Images, one of them wrong."""

    opened = 0

    def __init__(self, fault: str) -> None:
        super().__init__(9, 0, frozenset())
        self.fault = fault
        FaultyImages.opened += 1
        self.turn = FaultyImages.opened

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        if self.fault == "order" and self.turn % 2:
            example = example._replace(key=f"other-{index}")
        if self.fault == "eager":
            example.load()
        if self.fault == "lambda":
            return example._replace(load=lambda: super(FaultyImages, self).__getitem__(index).load())
        if index != 4:
            return example
        wrong: dict[str, dict[str, Any]] = {
            "key": {"key": "tiny-003"},
            "label": {"label": 3},
            "split": {"split": "val"},
            "load": {"load": lambda: example.load().tobytes()},
            "noise": {"load": lambda: Image.effect_noise((8, 8), 50)},
        }
        return example._replace(**wrong.get(self.fault, {}))


def test_dataset(tmp_path: Path) -> None:
    check_dataset(Images(), tmp_path)
    faults = {
        "key": "dataset.keys, keys are unique: expected each once, got 'tiny-003' 2 times",
        "label": "dataset.labels, a label is -1 or the index of a class: image 'tiny-004': expected -1 to 2, got 3",
        "split": "dataset.splits, a split is train, valid or test: image 'tiny-004': "
        "expected ('train', 'valid', 'test'), got 'val'",
        "load": "dataset.load, load() gives a PIL image: image 'tiny-004': expected a PIL image, got bytes",
        "noise": "dataset.loaded, loaded again, an image is the same: image 'tiny-004': "
        "expected the same pixels, got others",
        "eager": "dataset.lazy, no image is opened before load(): expected none, got 9 opened",
    }
    assert {fault: broken(check_dataset, Images(fault=fault), tmp_path) for fault in faults} == faults
    assert re.fullmatch(
        r"dataset\.order, .* in the same order: image 0: expected \('other-0', .*\), got \('tiny-000', .*\)",
        broken(check_dataset, Images(fault="order"), tmp_path),
    )
    assert broken(check_dataset, Images(fault="lambda"), tmp_path).startswith(
        "dataset.spawn, load() can be handed to a spawned worker, and gives the same image there: image 'tiny-000': "
        "expected a load that is no lambda, such as functools.partial, got "
    )


class Vit(TinyVit):
    """A backbone with one fault, or none."""

    fault: str = ""
    """Which."""

    def build(self, device: str) -> TinyBackbone:
        vit = FaultyVit(self.describe(), super().build(device).model)
        vit.fault = self.fault
        return vit.train(self.fault == "train").requires_grad_(self.fault == "grad")


class FaultyVit(TinyBackbone):
    """A tiny vision transformer that does one thing wrong."""

    fault = ""

    def view(self, image: Image.Image) -> Image.Image:
        return super().view(image).resize((16, 12)) if self.fault == "view" else super().view(image)

    def prepare(self, image: Image.Image) -> Tensor:
        return super().prepare(super().view(image)).to(torch.float64 if self.fault == "dtype" else torch.float32)

    def embed(self, images: Tensor) -> Tensor:
        tokens = super().embed(images)
        return tokens - tokens.mean(0) if self.fault == "batch" else tokens

    def tail(self, tokens: Tensor, first: int, last: int | None = None) -> Tensor:
        tokens = super().tail(tokens, first, last)
        return tokens.detach() if self.fault == "detached" else tokens

    def forward(self, images: Tensor) -> Tensor:
        tokens = super().forward(images)
        return self.model.get_submodule("norm")(tokens) if self.fault == "norm" else tokens

    def cls_after(self, tokens: Tensor, number: int) -> Tensor:
        return super().cls_after(tokens[:, :4] if self.fault == "cls" else tokens, number)


def test_backbone() -> None:
    check_backbone(Vit())
    photo = "an image of mode RGB, 83 x 61: expected"
    faults = {
        "train": "backbone.eval, build() returns it in eval mode: "
        "expected no module in training mode, got itself, model, model.patch_embed",
        "grad": "backbone.frozen, build() freezes the weights: "
        "expected no parameter with a gradient, got model.cls_token, model.pos_embed, model.patch_embed.proj.weight",
        "view": "backbone.view, view() is RGB and has the aspect of the grid: "
        f"{photo} that of 4 x 4 patches, got (16, 12)",
        "dtype": "backbone.prepare, prepare() gives float32 [3, height, width], all finite, of one shape for all "
        f"images: {photo} float32 [3, height, width], got float64 [3, 16, 16]",
        "detached": "backbone.gradient, gradients flow through tail(): "
        "expected an output with a gradient, got one that is detached",
    }
    assert {fault: broken(check_backbone, Vit(fault=fault)) for fault in faults} == faults
    assert broken(check_backbone, Vit(fault="norm")).startswith(
        "backbone.tail, tail() from any block on gives what the whole pass gives: after block 0: expected "
    )
    assert broken(check_backbone, Vit(fault="cls")).startswith(
        "backbone.cls, cls_after() gives [CLS] of what the block puts out: after block 1: expected "
    )
    assert broken(check_backbone, Vit(fault="batch")).startswith(
        "backbone.batch, an image's tokens do not depend on the others of its batch: expected "
    )


class Nearest(ProbeConfig):
    """Reads the nearest class mean, with one fault or none."""

    use: Literal["nearest"] = "nearest"

    fault: str = ""
    """Which."""

    def build(self, task: Task) -> Probe:
        return NearestProbe(task.d_model, len(task.classes), self.fault)

    def fit(self, task: Task, x_nd: Tensor, y_n: Tensor) -> Probe:
        probe = NearestProbe(task.d_model, len(task.classes), self.fault)
        mean_cd = torch.stack([x_nd[y_n == label].mean(0) for label in range(len(task.classes))])
        mean_cd = mean_cd.nan_to_num()
        if self.fault == "state":
            probe.offset = mean_cd.mean(0)
            mean_cd = mean_cd - probe.offset
        if self.fault == "random":
            mean_cd = torch.randn_like(mean_cd)
        if self.fault == "input":
            x_nd.zero_()
        probe.mean_cd.copy_(mean_cd)
        return probe


class NearestProbe(Probe):
    """Minus the square distance to each class mean."""

    mean_cd: Tensor

    def __init__(self, d_model: int, n_classes: int, fault: str) -> None:
        super().__init__()
        self.fault, self.offset = fault, torch.zeros(d_model)
        self.register_buffer("mean_cd", torch.zeros(n_classes, d_model))

    def forward(self, x_nd: Tensor) -> Tensor:
        logits_nc = -torch.cdist(x_nd - self.offset, self.mean_cd).square()
        return logits_nc.double() if self.fault == "dtype" else logits_nc


def test_probe() -> None:
    check_probe(Nearest())
    assert broken(check_probe, Nearest(fault="dtype")) == (
        "probe.logits, logits are float32 [n, class], all finite, whatever n and the number of classes: of 60 tokens: "
        "expected float32 [60, 3], got float64 [60, 3]"
    )
    for fault, said in {
        "state": "probe.stored, its state, stored and loaded, gives the same logits: expected ",
        "input": "probe.untouched, fit() leaves its tokens as they were: expected ",
        "random": "probe.learns, of three clouds six standard deviations apart it reads 90 % right: expected 90 %, ",
    }.items():
        torch.manual_seed(0)
        assert broken(check_probe, Nearest(fault=fault)).startswith(said)


def test_metric() -> None:
    class MeanOfBatches:
        def __init__(self) -> None:
            self.values: list[float] = []

        def add(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> None:
            self.values.append(float((x_nd - x_hat_nd).square().mean()))

        def result(self) -> float:
            return sum(self.values) / len(self.values)

    assert broken(check_metric, MeanOfBatches).startswith(
        "metric.cuts, another cut into batches gives the same: expected 0."
    )


def test_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unnamed(ProbeConfig):
        """Has no name."""

    class Undocumented(ProbeConfig):
        use: Literal["undocumented"] = "undocumented"

    class Silent(ProbeConfig):
        """Has a setting without a sentence."""

        use: Literal["silent"] = "silent"
        k: int = 1

    class Loose(ProbeConfig):
        """Does not come back from JSON."""

        use: Literal["loose"] = "loose"

        nested: Any = None
        """Anything."""

    class Part(BaseModel):
        x: int = 0

    assert broken(check_entry, Unnamed()) == (
        'entry.name, a config class says its name: use: Literal["name"] = "name": Unnamed: '
        "expected it, got no such line"
    )
    assert broken(check_entry, Undocumented()) == (
        "entry.docstring, a config class has a docstring: Undocumented: expected one, got none"
    )
    assert broken(check_entry, Silent()) == (
        "entry.sentences, each setting has a sentence below it: Silent.k: expected one, got none"
    )
    assert broken(check_entry, Loose(nested=Part())) == (
        "entry.json, dumped as JSON and read again, the settings and their content are the same: "
        "expected Loose(use='loose', nested=Part(x=0)), got Loose(use='loose', nested={'x': 0})"
    )

    (tmp_path / "heavy_plugin.py").write_text(
        '"""A plugin that imports too much."""\n'
        "from typing import Literal\n"
        "import scipy\n"
        "from saefw.plugin import ProbeConfig\n"
        "class Heavy(ProbeConfig):\n"
        '    """Imports scipy."""\n'
        '    use: Literal["heavy"] = "heavy"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    import heavy_plugin  # type: ignore[import-not-found]

    assert broken(check_entry, heavy_plugin.Heavy()) == (
        "entry.light, importing the module brings in nothing heavier than torch and numpy: heavy_plugin: "
        "expected imports inside the functions that use them, got scipy"
    )
