"""The plugin timm, against timm's own intermediate features, transforms and checkpoints."""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from trees import imagenet

import saefw_timm
from saefw.blocks import edited_tail, outputs
from saefw.catalog import Catalog
from saefw.errors import Faults, UserError
from saefw.pipeline import plan
from saefw.plugin import BackboneInfo, Place
from saefw.registry import read
from saefw.testing import check_backbone
from saefw_timm import Timm, TimmBackbone, facts

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}


class Shrunk(Timm):
    """A model of timm with few narrow blocks and random weights under which every block matters."""

    use: Literal["timm"] = "timm"

    smaller: dict[str, Any] = SMALL
    """What timm is told besides the name and the size."""

    pretrained: bool = False
    """Never."""

    def made(self, **where: Any) -> Any:
        sides = self.content()["img_size"]
        return saefw_timm._timm().create_model(self.model, img_size=tuple(sides), **self.smaller, **where)

    def describe(self) -> BackboneInfo:
        with torch.device("meta"):
            return saefw_timm._info(self.made())

    def build(self, device: str) -> TimmBackbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.made()
            with torch.no_grad():
                for parameter in model.parameters():
                    # Fresh layer scales are near 0, so that a block would hardly be seen to lack anything.
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        kind = saefw_timm._kind(model)
        return kind(self.describe(), model).to(device).eval().requires_grad_(False)


CLS: tuple[Any, ...] = ("cls",)
REGISTERS: tuple[Any, ...] = ("register",) * 4
SHARED = {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}

ARCHITECTURES: dict[str, tuple[Any, int, tuple[Any, ...], dict[str, Any]]] = {
    "vit_tiny_patch16_224": ("TimmBackbone", 64, CLS, SMALL),
    "deit_tiny_patch16_224": ("TimmBackbone", 64, CLS, SMALL),
    "deit_tiny_distilled_patch16_224": ("TimmBackbone", 64, ("cls", "dist"), SMALL),
    "deit3_small_patch16_224": ("TimmBackbone", 64, CLS, SMALL),
    "vit_small_patch14_dinov2": ("TimmBackbone", 56, CLS, SMALL),
    "vit_small_patch14_reg4_dinov2": ("TimmBackbone", 56, CLS + REGISTERS, SMALL),
    "vit_base_patch16_clip_224": ("TimmBackbone", 64, CLS, SMALL),
    "vit_base_patch16_siglip_224": ("TimmBackbone", 64, (), SMALL),
    "vit_medium_patch16_reg4_gap_256": ("TimmBackbone", 64, REGISTERS, SMALL),
    "vit_base_patch16_rpn_224": ("TimmBackbone", 64, (), SMALL),
    "vit_base_patch16_xp_224": ("TimmBackbone", 64, CLS, SMALL),
    "aimv2_large_patch14_224": ("TimmBackbone", 56, (), SMALL),
    "vit_intern300m_patch14_448": ("TimmBackbone", 56, CLS, SMALL),
    "vit_tiny_r_s16_p8_224": ("TimmBackbone", 64, CLS, SMALL),
    "vit_small_patch16_dinov3": ("EvaBackbone", 64, CLS + REGISTERS, SMALL),
    "vit_small_plus_patch16_dinov3": ("EvaBackbone", 64, CLS + REGISTERS, SMALL),
    "eva_large_patch14_196": ("TimmBackbone", 56, CLS, SMALL),
    "eva_giant_patch14_224": ("EvaBackbone", 56, CLS, SMALL),
    "eva02_tiny_patch14_224": ("EvaBackbone", 56, CLS, SMALL),
    "eva02_enormous_patch14_clip_224": ("EvaBackbone", 56, CLS, SMALL),
    "vit_pe_core_tiny_patch16_384": ("EvaBackbone", 64, CLS, SMALL),
    "vit_pe_spatial_tiny_patch16_512": ("EvaBackbone", 64, CLS, SMALL),
    "vit_small_patch16_rope_mixed_224": ("EvaBackbone", 64, CLS, SMALL),
    "beit_base_patch16_224": ("BeitBackbone", 64, CLS, SMALL),
    "beit_base_patch16_224 with a shared bias": ("BeitBackbone", 64, CLS, SMALL | SHARED),
    "beitv2_base_patch16_224": ("BeitBackbone", 64, CLS, SMALL),
    "vit_relpos_base_patch16_cls_224": ("RelPosBackbone", 64, CLS, SMALL),
    "vit_srelpos_small_patch16_224": ("RelPosBackbone", 64, (), SMALL),
}
"""By name: what wraps it, the rows of its images here, its prefix tokens, how it is shrunk."""


def configured(name: str) -> Shrunk:
    _, side, _, smaller = ARCHITECTURES[name]
    return Shrunk(model=name.partition(" ")[0], img_size=(side, 2 * side), smaller=smaller)


def theirs(backbone: TimmBackbone, images: torch.Tensor) -> list[torch.Tensor]:
    """What timm's own call for intermediate features gives, prefix tokens in front."""
    n = backbone.info.n_prefix
    found = backbone._model.forward_intermediates(
        images, norm=False, output_fmt="NLC", return_prefix_tokens=n > 0, intermediates_only=True
    )
    return [torch.cat([prefix, patches], dim=1) for patches, prefix in found] if n else found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_give_what_timm_gives(name: str) -> None:
    kind, side, prefix, _ = ARCHITECTURES[name]
    config = configured(name)
    backbone = config.build("cpu")
    assert type(backbone).__name__ == kind
    info = backbone.info
    assert info.prefix == prefix
    assert info.grid[1] == 2 * info.grid[0]
    images = torch.randn(2, 3, side, 2 * side, generator=torch.Generator().manual_seed(0))
    truth = theirs(backbone, images)
    ours = outputs(backbone, images, range(info.n_blocks))
    assert len(truth) == len(ours) == info.n_blocks
    whole = backbone(images)
    for layer, tokens in enumerate(truth):
        assert torch.equal(ours[layer], tokens)
        assert torch.equal(edited_tail(backbone, tokens, layer), whole)
    if info.has_cls:
        for number in range(1, info.n_blocks):
            alone = backbone.cls_after(truth[number - 1], number)
            torch.testing.assert_close(alone, truth[number][:, 0], rtol=1e-5, atol=1e-5)
    assert all(float((one - two).abs().mean()) > 0.05 for one, two in pairwise(truth))
    assert torch.equal(backbone._model.norm(whole), backbone._model.forward_features(images))
    assert torch.equal(backbone.embedding(whole), backbone._model.forward_head(backbone._model.norm(whole), True))
    assert torch.equal(backbone.classify(images), backbone._model(images))
    check_backbone(config)


@pytest.mark.parametrize("more", [{}, {"qkv_bias": True, "qk_norm": True}, {"scale_norm": True, "gated": True}])
def test_attention_of_one_query_is_that_of_the_first_token(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    attention = (
        saefw_timm._timm().layers.Attention(24, 3, norm_layer=torch.nn.LayerNorm, **more).eval().requires_grad_(False)
    )
    x_btd = torch.randn(2, 7, 24)
    torch.testing.assert_close(saefw_timm._attended(attention, x_btd), attention(x_btd)[:, :1], rtol=1e-5, atol=1e-6)


def test_describe_knows_the_full_sizes() -> None:
    found = {
        name: Timm(model=name).describe()
        for name in (
            "vit_base_patch16_224",
            "vit_giant_patch14_reg4_dinov2.lvd142m",
            "deit_base_distilled_patch16_384",
            "vit_base_patch16_siglip_224.webli",
            "vit_pe_core_base_patch16_224",
            "vit_base_patch16_rope_reg1_gap_256",
        )
    }
    assert found == {
        "vit_base_patch16_224": BackboneInfo(768, 12, (14, 14), CLS, 768),
        "vit_giant_patch14_reg4_dinov2.lvd142m": BackboneInfo(1536, 40, (37, 37), CLS + REGISTERS, 1536),
        "deit_base_distilled_patch16_384": BackboneInfo(768, 12, (24, 24), ("cls", "dist"), 768),
        "vit_base_patch16_siglip_224.webli": BackboneInfo(768, 12, (14, 14), (), 768),
        "vit_pe_core_base_patch16_224": BackboneInfo(768, 12, (14, 14), CLS, 768),
        "vit_base_patch16_rope_reg1_gap_256": BackboneInfo(768, 12, (16, 16), ("register",), 768),
    }
    assert Timm(model="vit_base_patch16_224", img_size=(384, 160)).describe().grid == (24, 10)


def test_a_patch_that_does_not_divide_the_image_leaves_out_its_edge() -> None:
    backbone = Shrunk(model="vit_so400m_patch14_siglip_384").build("cpu")
    assert backbone.info.grid == (27, 27)
    images = torch.randn(1, 3, 384, 384)
    assert torch.equal(backbone._model.norm(backbone(images)), backbone._model.forward_features(images))


# What is known without timm


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the file be asked, as where timm is not imported."""
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    facts._known.cache_clear()
    yield
    facts._known.cache_clear()


ours = pytest.mark.skipif(
    facts.FILE.read_text().split("\n")[0] != f"timm {version('timm')}", reason="the file is of another timm"
)


@ours
def test_what_the_file_says_is_what_timm_says() -> None:
    saefw_timm._timm()
    from timm.models import get_arch_pretrained_cfgs

    saefw_timm.stack.cache_clear()
    lines = facts.FILE.read_text().splitlines()[1:]
    for line in lines[:: len(lines) // 24]:
        read = facts.Stack.read(line)
        assert (saefw_timm.stack(read.name), str(read)) == (read, line)
    assert [read.name.partition(".")[0] for read in map(facts.Stack.read, lines)] == [
        arch for arch in saefw_timm.architectures() for _ in get_arch_pretrained_cfgs(arch) or [arch]
    ]


@ours
@pytest.mark.slow
def test_the_file_is_what_timm_says() -> None:
    command = [sys.executable, str(Path(__file__).parents[1] / "scripts/timm_facts.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == facts.FILE.read_text()


@ours
@pytest.mark.usefixtures("alone")
def test_the_file_knows_timms_choice_and_nothing_else() -> None:
    first, tagged = facts.known("vit_base_patch16_224"), facts.known("vit_base_patch16_224.mae")
    assert first is not None and first.name == "vit_base_patch16_224.augreg2_in21k_ft_in1k" and first.info.d_embed
    assert tagged is None or tagged.name == "vit_base_patch16_224.mae"
    assert facts.known("vit_base_patch16_224.none") is facts.known("resnet50") is facts.known("") is None


@pytest.mark.usefixtures("alone")
def test_the_file_is_of_one_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, *lines = facts.FILE.read_text().splitlines()
    monkeypatch.setattr(facts, "FILE", tmp_path / "models.txt")
    for number, other in ((version("timm"), False), ("0.0", True)):
        facts._known.cache_clear()
        facts.FILE.write_text("\n".join([f"timm {number}", *lines]))
        assert (facts.known("deit_tiny_patch16_224") is None) == other
    facts.FILE.write_text("\n".join([f"timm {version('timm')}", *lines]))
    facts._known.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", saefw_timm)
    assert facts.known("deit_tiny_patch16_224") is None, "timm is imported: it is asked itself"


@ours
def test_planning_imports_no_timm_and_plans_the_same(tmp_path: Path) -> None:
    imagenet(tmp_path / "set")
    (tmp_path / "registry.yaml").write_text(
        "saefw: 1\n"
        "backbones:\n"
        "  vit: {use: timm, img_size: 384, vary: {model: [deit_tiny_patch16_224, vit_base_patch16_224.mae]}}\n"
        "datasets: {imagenet: {use: imagenet, root: set}}\n"
        "stages: {acts: {use: record, backbone: vit, datasets: [imagenet], layers: [-1, 3]}}\n"
    )
    code = "import sys; from saefw.plugin import mend_torchvision; from saefw.cli import main; {}; main()"
    last = "import atexit; atexit.register(lambda: print('timm' in sys.modules))"
    told = []
    for first in (last, f"mend_torchvision(); import timm; {last}"):
        command = [sys.executable, "-c", code.format(first), "run", "--dry"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        told.append(done.stdout.splitlines())
    assert [lines.pop() for lines in told] == ["False", "True"]
    # What follows the list of units is how long they take.
    units, others = (lines[: lines.index("")] for lines in told)
    assert len(units) == 6 and units == others


# Preprocessing


def photos() -> list[Image.Image]:
    """Make images that are wide, tall, square, tiny, grey, with a palette, with transparency."""
    rng = np.random.default_rng(0)
    colour, grey, clear = (
        [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
        for shapes in (
            [(61, 183, 3), (190, 47, 3), (64, 64, 3), (3, 5, 3), (1, 1, 3), (301, 302, 3)],
            [(40, 90)],
            [(33, 70, 4)],
        )
    )
    return [*colour, *grey, *clear, colour[0].convert("P")]


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("sides", [(64, 64), (64, 160), (96, 32)])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_base_patch16_224_miil", "vit_small_patch16_dinov3"])
def test_images_are_prepared_as_timm_does_it(name: str, sides: tuple[int, int], crop_mode: str) -> None:
    data = saefw_timm._timm().data
    model = Shrunk(model=name, img_size=sides).made()
    model.pretrained_cfg["crop_mode"] = crop_mode
    backbone = TimmBackbone(saefw_timm._info(Shrunk(model=name, img_size=sides).made(device="meta")), model)
    config = data.resolve_model_data_config(model) | {"input_size": (3, *sides)}
    transform = data.create_transform(**config)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    for photo in photos():
        prepared = backbone.prepare(photo)
        assert torch.equal(prepared, transform(photo.convert("RGB")))
        view = backbone.view(photo)
        assert (view.mode, view.size) == ("RGB", sides[::-1])
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255
        assert torch.equal(prepared, (pixels - mean) / std)


@pytest.mark.parametrize("sides", [(224, 224), (96, 320), (320, 96)])
@pytest.mark.parametrize("size", [(640, 300), (300, 640), (500, 500)])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_small_patch16_dinov3"])
def test_a_painted_square_lights_its_patch(name: str, size: tuple[int, int], sides: tuple[int, int]) -> None:
    """The square is painted where, by hand, the middle of the patch lies in the image before resizing and cropping."""
    backbone = Shrunk(model=name, img_size=sides).build("cpu")
    rows, columns = backbone.info.grid
    config = backbone._model.pretrained_cfg
    for row, column in ((0, 0), (1, columns - 2), (rows // 2, 1), (rows - 1, columns - 1)):
        scales = [size[1] * config["crop_pct"] / sides[0], size[0] * config["crop_pct"] / sides[1]]
        if config["crop_mode"] != "squash":
            scales = [min(scales)] * 2
        middle = [
            whole / 2 + ((at + 0.5) * 16 - side / 2) * scale
            for whole, at, side, scale in zip(size[::-1], (row, column), sides, scales, strict=True)
        ]
        half = [scale * 5 for scale in scales]
        plain, painted = Image.new("RGB", size, "grey"), Image.new("RGB", size, "grey")
        box = [middle[1] - half[1], middle[0] - half[0], middle[1] + half[1], middle[0] + half[0]]
        painted.paste("red", tuple(round(edge) for edge in box))
        before, after = (backbone.embed(backbone.prepare(image)[None])[0] for image in (plain, painted))
        change = (after - before).abs().sum(1)[backbone.info.n_prefix :]
        assert int(change.argmax()) == row * columns + column
        seen = np.abs(np.array(backbone.view(painted), int) - np.array(backbone.view(plain), int)).sum(2)
        lit = seen.reshape(rows, 16, columns, 16).sum((1, 3))
        assert int(lit.argmax()) == row * columns + column


# Weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Store the weights of timm's smallest ViT, drawn anew, in both formats."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    state = {
        name: torch.randn_like(value)
        for name, value in saefw_timm._timm().create_model("test_vit").state_dict().items()
    }
    save_file(state, folder / "vit.safetensors")
    torch.save({"state_dict": state}, folder / "vit.pth")
    save_file(
        {name: value for name, value in state.items() if not name.startswith("head.")}, folder / "headless.safetensors"
    )
    return folder


def test_checkpoints_are_loaded(weights: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(weights / "vit.safetensors")
    for file in ("vit.safetensors", "vit.pth"):
        backbone = Timm(model="test_vit", checkpoint=Place(weights / file)).build("cpu")
        found = backbone._model.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    bare = Timm(model="test_vit", checkpoint=Place(weights / "headless.safetensors"), num_classes=0).build("cpu")
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(bare(images), backbone(images))


def test_positions_are_interpolated(weights: Path) -> None:
    from safetensors.torch import load_file

    stored = load_file(weights / "vit.safetensors")["pos_embed"]
    config = Timm(model="test_vit", checkpoint=Place(weights / "vit.safetensors"), img_size=(96, 240))
    backbone = config.build("cpu")
    assert backbone.info.grid == (6, 15)
    wanted = saefw_timm._timm().layers.resample_abs_pos_embed(
        stored, new_size=(6, 15), old_size=(10, 10), num_prefix_tokens=1
    )
    assert torch.equal(backbone._model.pos_embed, wanted)
    check_backbone(config)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was-here",)


def test_a_file_that_is_no_such_checkpoint_is_named(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.safetensors").write_text("no weights")
    Path("text.pth").write_text("no weights")
    Path("empty.bin").touch()
    torch.save(torch.ones(3), "tensor.pth")
    Path("bomb.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    torch.save({"head.weight": Bomb()}, "zipped.pth")
    Path("folder").mkdir()

    def told(file: str, model: str = "test_vit") -> str:
        with pytest.raises(UserError) as error:
            Timm(model=model, checkpoint=Place(file)).build("cpu")
        return str(error.value)

    assert told("missing.pth") == "checkpoint 'missing.pth': there is no file missing.pth"
    assert told("folder") == "checkpoint 'folder': there is no file folder"
    for file in ("text.safetensors", "text.pth", "empty.bin", "tensor.pth", "bomb.pth", "zipped.pth"):
        text = told(file)
        assert text.startswith(f"checkpoint '{file}' is none of timm's 'test_vit.r160_in1k' ("), text
        assert "\n" not in text and len(text) < 320
    assert not Path("was-here").exists()
    other = told(str(weights / "vit.safetensors"), "deit_tiny_patch16_224")
    assert "Error(s) in loading state_dict for VisionTransformer: Missing key(s)" in other
    with pytest.raises(UserError, match=r"the variable \$NOWHERE is not set"):
        Timm(model="test_vit", checkpoint=Place("$NOWHERE/x.pth")).build("cpu")


def test_random_weights_are_always_the_same_and_draw_from_no_other_stream() -> None:
    config = Timm(model="test_vit", pretrained=False)
    state = torch.get_rng_state()
    one, two = (config.build("cpu")._model.state_dict() for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    check_backbone(config)


def test_what_is_written_differently_is_the_same_backbone() -> None:
    plain = Timm(model="vit_base_patch16_224").content()
    assert plain == {
        "revision": 1,
        "use": "timm",
        "model": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "img_size": [224, 224],
        "checkpoint": None,
        "num_classes": None,
        "pretrained": True,
    }
    full = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    for same in (Timm(model=full), Timm(model=full, img_size=224), Timm(model=full, img_size=(224, 224))):
        assert same.content() == plain
    assert Timm(model="vit_base_patch16_224.mae").content() != plain
    assert Timm(model=full, checkpoint=Place("$W/a.bin")).content()["checkpoint"] == "$W/a.bin"


# From registry.yaml

STAGE = """
datasets:
  digits: {use: digits, limit: 4}
stages:
  acts: {use: record, backbone: vit, datasets: [digits], layers: [-1, 11, 3]}
"""


def written(folder: Path, settings: str) -> Path:
    path = folder / "registry.yaml"
    path.write_text(f"saefw: 1\nbackbones:\n  vit: {{use: timm, {settings}}}\n{STAGE}")
    return path


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            "model: vit_bas_patch16_224",
            "20: backbones.vit.model: timm has no such model; did you mean 'vit_base_patch16_224'? "
            "(got 'vit_bas_patch16_224')",
        ),
        (
            "model: vit_tiny_patch16_224_in21k",
            "20: backbones.vit.model: timm has no such model; did you mean 'vit_tiny_patch16_224.augreg_in21k'? "
            "(got 'vit_tiny_patch16_224_in21k')",
        ),
        (
            "model: qqq",
            "20: backbones.vit.model: timm has no such model; near names of its ViTs: 'vit_tiny_patch16_dinov3_qkvb', "
            "'vit_base_patch16_dinov3_qkvb', 'vit_small_patch16_dinov3_qkvb' (got 'qqq')",
        ),
        (
            "model: deit_tiny_patch16_224.mine",
            "20: backbones.vit.model: timm has no such weights of 'deit_tiny_patch16_224' (there are: fb_in1k) "
            "(got 'deit_tiny_patch16_224.mine')",
        ),
        (
            "model: swin_tiny_patch4_window7_224.ms_in1k",
            "20: backbones.vit.model: is no plain stack of ViT blocks; near names that are: 'vit_tiny_patch16_224', "
            "'deit_tiny_patch16_224', 'eva02_tiny_patch14_224' (got 'swin_tiny_patch4_window7_224.ms_in1k')",
        ),
        (
            "model: deit_tiny_patch16_224, img_size: 225",
            "50: backbones.vit.img_size: must be a multiple of 16, the side of a patch, such as 224 (got 225)",
        ),
        (
            "model: deit_tiny_patch16_224, vary: {img_size: [224, [224, 100]]}",
            "73: backbones.vit.vary.img_size.1: must be a multiple of 16, the side of a patch, such as 96 "
            "(got [224, 100])",
        ),
        (
            "model: deit_tiny_patch16_224, img_size: -16",
            "50: backbones.vit.img_size: must be a multiple of 16, the side of a patch, such as 16 (got -16)",
        ),
        (
            "model: vit_giant_patch14_224",
            "3: backbones.vit: timm has no weights of 'vit_giant_patch14_224.untrained': name a checkpoint, or set "
            "pretrained: false for random ones",
        ),
        (
            "model: deit_tiny_patch16_224, checkpoint: w.bin, pretrained: false",
            "3: backbones.vit: checkpoint names weights, and pretrained: false asks for random ones; leave one out",
        ),
        (
            "model: deit_tiny_patch16_224, num_classes: 3",
            "3: backbones.vit: num_classes is said of a checkpoint, and none is named",
        ),
    ],
)
def test_faults_have_their_place(tmp_path: Path, settings: str, told: str) -> None:
    path = written(tmp_path, settings)
    with pytest.raises(Faults) as error:
        read(path, Catalog())
    assert error.value.lines == [f"{path}:3:{told}"]


@pytest.mark.parametrize(
    "name", ["resnet50", "hiera_tiny_224", "samvit_base_patch16", "naflexvit_base_patch16_gap", "cait_s24_224"]
)
def test_what_is_no_stack_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no plain stack of ViT blocks; near names that are: '"):
        Timm(model=name)


def test_planning_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("planning went to the network")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    registry = read(written(tmp_path, "model: vit_base_patch16_224"), catalog := Catalog())
    (planned,) = plan(registry, catalog)
    assert [unit.content["layer"] for unit in planned.missing] == [11, 3], "-1 and 11 are one"


def test_a_checkpoint_lies_beside_the_registry(weights: Path) -> None:
    registry = read(written(weights, "model: test_vit, checkpoint: vit.safetensors"), Catalog())
    (member,) = registry.families["backbones"]["vit"]
    assert isinstance(member.entry, Timm)
    assert member.entry.content()["checkpoint"] == "vit.safetensors"
    assert member.entry.build("cpu").info == BackboneInfo(64, 6, (10, 10), CLS, 64)


def test_without_network_a_run_says_what_to_do(tmp_path: Path) -> None:
    path = written(tmp_path, "model: deit_tiny_patch16_224")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", "from saefw.cli import main; main()", "run", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    told = done.stderr.strip().splitlines()[-1]
    assert told.startswith(f"{path}:8:3: stages.acts: the weights of timm's 'deit_tiny_patch16_224.fb_in1k' cannot be ")
    assert told.endswith("; name a local file as its checkpoint")
