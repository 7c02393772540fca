"""`saefw check` names the files and folders that entries name and that are not there, and finds no fault with that."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from saefw.cli import app

REGISTRY = """\
saefw: 1
backbones:
  file: {use: timm, model: vit_tiny_patch16_224, checkpoint: weights/vit.safetensors}
  tag: {use: open-clip, arch: ViT-B-32, pretrained: laion2b_s34b_b79k}
  other:
    use: open-clip
    arch: ViT-B-32
    vary: {pretrained: [laion2b_s34b_b79k, here.pt, gone.pt]}
datasets:
  here: {use: image-folder, root: here}
  gone: {use: image-folder, root: gone, layout: flat}
  unset: {use: image-folder, root: $NOT_SET/x}
stages: {}
"""


def test_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NOT_SET", raising=False)
    Path("here").mkdir()
    Path("here.pt").touch()
    Path("registry.yaml").write_text(REGISTRY)
    said = CliRunner().invoke(app, ["check"])
    cannot = "what needs it cannot be made here"
    assert (said.exit_code, said.stdout.splitlines()[-1], said.stderr) == (
        0,
        "registry.yaml: fine; 5 backbones, 3 datasets",
        f"""\
registry.yaml:3:50: backbones.file.checkpoint: weights/vit.safetensors is not there; {cannot}
registry.yaml:8:12: backbones.other.pretrained: gone.pt is not there; {cannot}
registry.yaml:11:29: datasets.gone.root: gone is not there; {cannot}
registry.yaml:12:30: datasets.unset.root: '$NOT_SET/x': the variable $NOT_SET is not set; {cannot}
""",
    )


def test_check_tells_of_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("registry.yaml").write_text("saefw: 1\ndevice: cuda:99\nstages: {}\n")
    said = CliRunner().invoke(app, ["check"])
    assert (said.exit_code, said.stderr) == (
        0,
        "registry.yaml:2:1: device: cuda:99: this machine, or this build of torch, has none; try auto or cpu\n",
    )
