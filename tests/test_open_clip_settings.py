"""What the settings of open-clip may be: every fault with its place, every plan without the network."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import desk

from saefw.catalog import Catalog
from saefw.errors import Faults, UserError
from saefw.plugin import BackboneInfo, Place, mend_torchvision
from saefw.registry import read
from saefw.stages.record import Record
from saefw_open_clip import OpenClip
from saefw_open_clip.library import load, model_of, of_hub, shapes, tokenizer_of, transform_of, written


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a network, and without anything downloaded before."""

    def refused(*args: Any) -> None:
        raise AssertionError("something was to be downloaded")

    mend_torchvision()
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


FAULTS = {
    "{arch: ViT-B-16, pretrained: openai}": (
        "pretrained: trained with QuickGELU, which ViT-B-16 has not; write arch: ViT-B-16-quickgelu (got 'openai')"
    ),
    "{arch: ViT-B-16-quickgelu, pretrained: laion2b_s34b_b88k}": (
        "pretrained: trained without QuickGELU, which ViT-B-16-quickgelu has; write arch: ViT-B-16 "
        "(got 'laion2b_s34b_b88k')"
    ),
    "{arch: ViT-B16, pretrained: openai}": (
        "arch: open_clip has no architecture 'ViT-B16'; did you mean 'ViT-B-16'? (got 'ViT-B16')"
    ),
    "{arch: ViT-B-32-quickgelu, pretrained: opnai}": (
        "pretrained: ViT-B-32-quickgelu has no tag 'opnai'; did you mean 'openai'? (got 'opnai')"
    ),
    "{arch: ViT-B-16-SigLIP, pretrained: openai}": (
        "pretrained: ViT-B-16-SigLIP has no tag 'openai' (there are: webli); it is one of ViT-B-32, ViT-B-16, "
        "ViT-L-14, ViT-L-14-336, ViT-B-32-quickgelu (got 'openai')"
    ),
    "{arch: ViT-M-16, pretrained: mine}": (
        "pretrained: ViT-M-16 has no tag 'mine'; a file is written with its folder: ./FILE (got 'mine')"
    ),
    "{arch: RN50, pretrained: openai}": (
        "arch: its vision tower is a ModifiedResNet, no vision transformer; with embeddings as wide there are "
        "ViT-g-14, ViT-H-14, ViT-H-14-378, ViT-H-14-378-quickgelu, ViT-H-14-CLIPA (got 'RN50')"
    ),
    "{arch: convnext_base, pretrained: laion400m_s13b_b51k}": (
        "arch: its vision tower is a ConvNeXt, no vision transformer; with embeddings as wide there are ViT-B-16, "
        "ViT-B-16-quickgelu, ViT-B-32, ViT-B-32-256, ViT-B-32-quickgelu (got 'convnext_base')"
    ),
    "{arch: hf-hub:imageomics/bioclip, pretrained: x}": (
        "arch: a repository holds weights too: write pretrained: hf-hub:imageomics/bioclip, without arch "
        "(got 'hf-hub:imageomics/bioclip')"
    ),
    "{pretrained: openai}": "pretrained: arch is required, unless this is hf-hub:ORG/NAME (got 'openai')",
    "{pretrained: hf-hub:bioclip}": (
        "pretrained: a repository of huggingface.co is written hf-hub:ORG/NAME (got 'hf-hub:bioclip')"
    ),
    "{pretrained: hf-hub:some/model}": (
        "pretrained: the shapes of some/model are not known without its open_clip_config.json: say them by arch, or "
        "run `hf download some/model` first (got 'hf-hub:some/model')"
    ),
    "{arch: $NOWHERE/a.json, pretrained: a.pt}": (
        "arch: '$NOWHERE/a.json': the variable $NOWHERE is not set (got '$NOWHERE/a.json')"
    ),
    "{arch: none.json, pretrained: a.pt}": (
        "arch: {folder}/none.json cannot be read as JSON: No such file or directory (got 'none.json')"
    ),
    "{arch: list.json, pretrained: a.pt}": (
        "arch: {folder}/list.json: the config of a model is a mapping (got 'list.json')"
    ),
    "{arch: text.json, pretrained: a.pt}": (
        "arch: {folder}/text.json cannot be read as JSON: Expecting value: line 1 column 1 (char 0) (got 'text.json')"
    ),
    "{arch: half.json, pretrained: a.pt}": "arch: the config of a model says 'text_cfg' too (got 'half.json')",
    "{arch: odd.json, pretrained: a.pt}": (
        "arch: open_clip can make no model of this config: CLIPVisionCfg.__init__() got an unexpected keyword argument "
        "'widht' (got 'odd.json')"
    ),
    "{arch: hub.json, pretrained: a.pt}": (
        "arch: open_clip can make no model of this config: timm_model_name must be one of timm's own names "
        "(got 'hub.json')"
    ),
}  # fmt: skip
"""What is wrong, and the sentence."""


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("entry", FAULTS)
def test_faults_have_their_place(entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    vit: dict[str, Any] = {"embed_dim": 8, "vision_cfg": {"layers": 1}}
    for name, text in {
        "list": "[]",
        "text": "layers: 3",
        "half": json.dumps(vit),
        "odd": json.dumps({**vit, "vision_cfg": {"widht": 8}, "text_cfg": {}}),
        "hub": json.dumps({**vit, "vision_cfg": {"timm_model_name": "hf-hub:timm/vit"}, "text_cfg": {}}),
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    path = tmp_path / "registry.yaml"
    path.write_text(f"saefw: 1\nbackbones:\n  clip: {{use: open-clip, {entry[1:]}\n")
    with pytest.raises(Faults) as caught:
        read(path, Catalog())
    text = FAULTS[entry].replace("{folder}", str(tmp_path))
    column = path.read_text().splitlines()[2].index(f"{text.split(':')[0]}: ") + 1
    assert caught.value.lines == [f"{path}:3:{column}: backbones.clip.{text}"]


PLANS = {
    "{arch: ViT-B-16-quickgelu, pretrained: openai}": BackboneInfo(768, 12, (14, 14), ("cls",), 512),
    "{arch: ViT-B-16-SigLIP, pretrained: webli}": BackboneInfo(768, 12, (14, 14), (), 768),
    "{arch: ViT-L-14, pretrained: $WEIGHTS/mine.pt}": BackboneInfo(1024, 24, (16, 16), ("cls",), 768),
    "{pretrained: hf-hub:imageomics/bioclip}": BackboneInfo(768, 12, (14, 14), ("cls",), 512),
    "{pretrained: hf-hub:imageomics/bioclip-2}": BackboneInfo(1024, 24, (16, 16), ("cls",), 768),
    "{pretrained: hf-hub:timm/ViT-B-16-SigLIP}": BackboneInfo(768, 12, (14, 14), (), 768),
    "{arch: ViT-H-14, pretrained: hf-hub:some/model}": BackboneInfo(1280, 32, (16, 16), ("cls",), 1024),
}
"""Entries that are planned with neither weights nor network, and their shapes."""


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("entry", PLANS)
def test_planning_downloads_nothing(entry: str, tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text(f"saefw: 1\nbackbones:\n  clip: {{use: open-clip, {entry[1:]}\n")
    (member,) = read(path, Catalog()).families["backbones"]["clip"]
    config, info = member.entry, PLANS[entry]
    assert isinstance(config, OpenClip) and config.describe() == info
    run = desk(tmp_path, {"backbones": {"clip": config}})
    last, counted = (
        list(Record(backbone="clip", datasets=["tiny"], layers=[layer]).units(run)) for layer in (-1, info.n_blocks - 1)
    )
    assert last == counted and last[0].content["layer"] == info.n_blocks - 1
    assert Record(backbone="clip", datasets=["tiny"], layers=[-1]).disk(last[0], run) > 0


def test_spellings_of_open_clip_are_one(tmp_path: Path) -> None:
    one, two = (
        OpenClip(arch="ViT-B/32", pretrained="laion2b-S34B-b79k"),
        OpenClip(arch="ViT-B-32", pretrained="laion2b_s34b_b79k"),
    )
    assert one.content() == two.content()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("pretrained", ["openai", "hf-hub:imageomics/bioclip"])
def test_what_cannot_be_downloaded(pretrained: str) -> None:
    arch = None if pretrained.startswith("hf-hub:") else "ViT-B-16-quickgelu"
    source = "imageomics/bioclip" if arch is None else "timm/vit_base_patch16_clip_224.openai/"
    with pytest.raises(UserError) as caught:
        OpenClip(arch=arch, pretrained=pretrained).build("cpu")
    head, _, tail = str(caught.value).partition("downloaded (")
    assert head == f"pretrained: the weights of '{pretrained}', {source}, are not on this machine and cannot be "
    assert tail.endswith("); fetch the file elsewhere and write its path: pretrained: FILE")
    assert "\n" not in tail


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    model = model_of({"embed_dim": 8, "vision_cfg": SMALL, "text_cfg": TEXT})
    with pytest.raises(UserError, match=r"^pretrained: 'a\.pt': there is no file .*a\.pt$"):
        load(model, tmp_path / "a.pt", "a.pt")
    junk, other = tmp_path / "junk.safetensors", tmp_path / "other.pt"
    junk.write_bytes(b"junk")
    torch.save({"w": torch.zeros(2)}, other)
    code = tmp_path / "code.pt"
    torch.save({"w": Runs()}, code)
    for path, reason in (
        (junk, "Error while deserializing header"), (other, "Error.s. in loading state_dict for CLIP"),
        (code, "Weights only load failed"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"^pretrained: {path} does not hold the weights of this arch.*: {reason}"):
            load(model, path, str(path))
    assert not RAN


SMALL: dict[str, Any] = {"layers": 1, "width": 8, "head_width": 8, "image_size": 32, "patch_size": 16}
TEXT: dict[str, Any] = {"layers": 1, "width": 8, "heads": 1}
RAN: list[int] = []


class Runs:
    """Something whose unpickling runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return RAN.append, (1,)


def test_odd_parts_of_a_config() -> None:
    with pytest.raises(UserError) as caught:
        transform_of({"resize_mode": "tile"}, (32, 32))
    assert str(caught.value) == 'open_clip can prepare no images as preprocess_cfg says: {"resize_mode": "tile"}'
    model = model_of({"embed_dim": 8, "vision_cfg": {**SMALL, "pool_type": "none"}, "text_cfg": TEXT})
    assert shapes(model.visual, 8) == (BackboneInfo(8, 1, (2, 2), ("cls",), 0), (32, 32))


@pytest.mark.usefixtures("offline")
def test_a_tokenizer_that_is_not_here() -> None:
    with pytest.raises(
        UserError, match=r"^the (texts of this model need the tokenizer|tokenizer) timm/ViT-B-16-SigLIP"
    ):
        tokenizer_of(json.dumps(written(Place("ViT-B-16-SigLIP"))[0]["text_cfg"]))


@pytest.mark.usefixtures("offline")
def test_a_repository_in_the_cache(tmp_path: Path) -> None:
    """What `hf download` left is described and built without the network."""
    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    config = {"embed_dim": 8, "vision_cfg": SMALL, "text_cfg": TEXT, "quick_gelu": True}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    (snapshot / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.save(model_of(config).state_dict(), snapshot / "open_clip_pytorch_model.bin")
    assert of_hub("some/model") == config
    clip = OpenClip(pretrained="hf-hub:some/model")
    built: Any = clip.build("cpu")
    assert built.info == clip.describe() == BackboneInfo(8, 1, (2, 2), ("cls",), 8)
    assert type(built.blocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert built._normalise.mean == [0.5] * 3 and len(built._crop) == 2
    with pytest.raises(UserError) as caught:
        OpenClip(arch="ViT-B-32", pretrained="hf-hub:some/model").build("cpu")
    assert str(caught.value) == (
        "pretrained: some/model holds BackboneInfo(d_model=8, n_blocks=1, grid=(2, 2), prefix=('cls',), d_embed=8), "
        "but arch says BackboneInfo(d_model=768, n_blocks=12, grid=(7, 7), prefix=('cls',), d_embed=512)"
    )


@pytest.mark.slow
def test_every_architecture_is_described_or_refused() -> None:
    import open_clip

    refused = []
    for name in open_clip.list_models():
        try:
            info = OpenClip(arch=name, pretrained="./weights.safetensors").describe()
        except ValueError as error:
            assert "no vision transformer; with embeddings as wide there are ViT" in str(error)
            refused.append(name)
        else:
            assert min(info.d_model, info.n_blocks, *info.grid, info.d_embed) > 0
    families = ("convnext", "MobileCLIP-S", "MobileCLIP2-S", "RN", "swin")
    assert refused == [name for name in open_clip.list_models() if name.startswith(families)]
