"""Each check of the contract finds what it is there to find."""

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
from saefw.sae import Codes, Entries, Loss, Sae, largest
from saefw.testing import check_backbone, check_dataset, check_entry, check_metric, check_probe, check_sae


def broken(check: Callable[..., None], *args: object) -> str:
    """Return what a check says of something that breaks the contract."""
    with pytest.raises(AssertionError) as told:
        check(*args)
    assert str(told.value).startswith("the contract asks: ")
    return str(told.value).removeprefix("the contract asks: ")


class Variant(SaeConfig):
    """An SAE with one fault, or none."""

    use: Literal["variant"] = "variant"

    fault: str = ""
    """Which."""

    def build(self, d_model: int) -> Sae:
        return VariantSae(d_model, d_model * 4, self.fault)


class VariantSae(Sae):
    """Keeps the 4 largest, wrongly."""

    def __init__(self, d_model: int, d_sae: int, fault: str) -> None:
        super().__init__(d_model, d_sae)
        self.fault = fault
        self.calls = 0

    def select(self, pre_ns: Tensor) -> Entries:
        return largest(pre_ns, min(4, len(pre_ns)) if self.fault == "batch" else 4)

    def fire(self, pre: Tensor, features: Tensor | slice) -> Tensor:
        return pre.clamp(max=-0.1) if self.fault == "negative" else pre.relu()

    def encode(self, x_nd: Tensor) -> Codes:
        codes = super().encode(x_nd)
        return codes._replace(values=2 * codes.values) if self.fault == "twin" else codes

    def loss(self, x_nd: Tensor, dead_s: Tensor) -> Loss:
        loss = super().loss(x_nd, dead_s)
        if self.fault == "loss":
            loss.terms["nan"] = loss.terms["mse"] / 0 * 0
        if self.fault == "gradient":
            return Loss({"mse": torch.zeros((), requires_grad=True)}, loss.fired_s)
        if self.fault == "state":
            self.mean += 1
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
    assert broken(check_sae, Variant(fault="twin")) == "encode() scattered is activate(), each feature once"
    assert broken(check_sae, Variant(fault="negative")) == "codes are zero or larger"
    assert broken(check_sae, Above(fault="edge")) == "fire() gives 0 where select() selects none"
    check_sae(Above())
    assert broken(check_sae, Variant(fault="batch")).startswith("in eval mode a token's codes do not depend on")
    assert broken(check_sae, Variant(fault="loss")).startswith("loss(): the term 'nan' is one finite number")
    assert broken(check_sae, Variant(fault="gradient")) == "the loss has a gradient"


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
    said = {fault: broken(check_dataset, Images(fault=fault), tmp_path) for fault in ("key", "label", "split", "load")}
    assert said["key"] == "keys are unique ('tiny-003' occurs 2 times)"
    assert said["label"] == "image 'tiny-004': its label is -1 or the index of one of 3 classes (got 3)"
    assert said["split"] == "image 'tiny-004': its split is one of ('train', 'valid', 'test') (got 'val')"
    assert said["load"].startswith("image 'tiny-004': load() gives a PIL image (got <class 'bytes'>)")
    assert "in the same order" in broken(check_dataset, Images(fault="order"), tmp_path)
    assert broken(check_dataset, Images(fault="noise"), tmp_path) == "image 'tiny-004': loaded again, it is the same"


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


def test_backbone() -> None:
    check_backbone(Vit())
    assert broken(check_backbone, Vit(fault="train")) == "build() returns it in eval mode"
    assert broken(check_backbone, Vit(fault="grad")) == "build() freezes the weights"
    assert "view() has the aspect of the grid 4 x 4 (got (16, 12))" in broken(check_backbone, Vit(fault="view"))
    assert "prepare() gives float32" in broken(check_backbone, Vit(fault="dtype"))
    assert broken(check_backbone, Vit(fault="norm")) == "the blocks one by one give what the whole pass gives"
    assert broken(check_backbone, Vit(fault="batch")).endswith("do not depend on the others of its batch")
    with pytest.raises(RuntimeError, match="does not require grad"):
        check_backbone(Vit(fault="detached"))


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
    assert broken(check_probe, Nearest(fault="state")) == "its state, stored and loaded, gives the same logits"
    assert broken(check_probe, Nearest(fault="dtype")) == "logits are float32 (got torch.float64)"
    assert broken(check_probe, Nearest(fault="input")) == "fit() leaves its tokens as they were"
    torch.manual_seed(0)
    assert broken(check_probe, Nearest(fault="random")).startswith(("of three clouds", "fitted again"))


def test_metric() -> None:
    class MeanOfBatches:
        def __init__(self) -> None:
            self.values: list[float] = []

        def add(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> None:
            self.values.append(float((x_nd - x_hat_nd).square().mean()))

        def result(self) -> float:
            return sum(self.values) / len(self.values)

    assert broken(check_metric, MeanOfBatches).startswith("another cut into batches gives the same")


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

    assert broken(check_entry, Unnamed()) == 'Unnamed says its name: use: Literal["name"] = "name"'
    assert broken(check_entry, Undocumented()) == "Undocumented has a docstring"
    assert broken(check_entry, Silent()) == "Silent.k has a sentence below it"
    assert broken(check_entry, Loose(nested=Part())) == "Loose: dumped and read again, the settings are the same"

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

    assert broken(check_entry, heavy_plugin.Heavy()).startswith("importing heavy_plugin brings in scipy; import that")
