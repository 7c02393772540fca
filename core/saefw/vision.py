"""Makes timm and open_clip import beside a torchvision without its operators.

The torchvision wheel of PyPI is built against CUDA's torch. Beside a CPU-only torch its extension does not load, and
`import torchvision`, hence `import timm` and `import open_clip`, dies with `operator torchvision::nms does not exist`.
Backbones need torchvision's transforms only; two declared, empty operators let it import.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_declared: list[Any] = []
"""Keeps the declaration alive: a Library takes its operators with it."""


def mend_torchvision() -> None:
    """Call it before the first import of timm, open_clip or torchvision; where they work as they are it does nothing.

    Where torchvision's extension cannot be loaded, the schemas of `torchvision::nms` and `torchvision::qnms`, which
    torchvision asks for on import, are declared without a kernel: calling them still fails, with torch's own message.
    """
    if _declared or hasattr(torch.ops.torchvision, "nms"):
        return
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return
    untyped: Any = torch
    for extension in sorted(Path(found.origin).parent.glob("_C*")):
        try:
            untyped.ops.load_library(extension)
        except OSError:
            continue
        return
    library = untyped.library.Library("torchvision", "DEF")
    library.define(f"nms{SIGNATURE}")
    library.define(f"qnms{SIGNATURE}")
    _declared.append(library)
