"""Timm and open_clip import beside this machine's torchvision, whatever its state."""

import subprocess
import sys


def fresh(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)


def test_a_plugin_can_import_timm() -> None:
    done = fresh(
        "from saefw.plugin import mend_torchvision\n"
        "mend_torchvision(); mend_torchvision()\n"
        "import timm, torchvision.transforms as transforms\n"
        "from PIL import Image\n"
        "print(tuple(transforms.ToTensor()(transforms.Resize(4)(Image.new('RGB', (8, 8)))).shape))\n"
        "import torch\n"
        "from saefw import vision\n"
        "try: torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
        "except NotImplementedError: assert vision._declared, 'a declared operator has no kernel'\n"
        "else: assert not vision._declared\n"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "(3, 4, 4)"), done.stderr


def test_nothing_is_declared_where_the_extension_loads() -> None:
    """An operator of that name stands for the extension, which cannot load beside every torch."""
    done = fresh(
        "import torch\n"
        "from saefw import vision\n"
        "theirs = torch.library.Library('torchvision', 'DEF')\n"
        "theirs.define('nms' + vision.SIGNATURE)\n"
        "vision.mend_torchvision()\n"
        "assert vision._declared == []\n"
    )
    assert done.returncode == 0, done.stderr
