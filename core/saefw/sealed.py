"""Tensors that a stopped run leaves to go on from, sealed.

safetensors notices a file that is cut short, but not a flipped byte in a tensor; a seal, the checksum of everything in
the file, does. Checkpoints and finished parts of a unit in the making are sealed: what is damaged is made again.
"""

import logging
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saefw import tensors as files
from saefw.care import write_atomically
from saefw.tensors import Form
from saefw.unit import canonical

HEADER = "saefw"
"""The one key of a file's metadata: several would be written in an order that changes from run to run."""

Check = Callable[[Mapping[str, Tensor], Mapping[str, Any]], None]
"""Looks at tensors and what is said about them; raises ValueError if they are not those wanted."""

log = logging.getLogger("saefw")


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
    """Write tensors of any device, and JSON about them, so that the file is there whole or not at all.

    Raises:
        OSError: the disk is full, say.

    """
    from safetensors.torch import save

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = canonical({"about": about or {}, "seal": _seal(ready, about or {})})
    write_atomically(path, save(ready, {HEADER: header}))


def read(path: Path, form: Form | Check) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and what is said about them; None if there is no such file, or if it is damaged.

    Damage is said in a warning.

    Args:
        path: the file.
        form: what the tensors must be like; or what looks at them and at what is said, and raises ValueError.

    """
    if not path.exists():
        return None
    try:
        tensors, metadata = files.read(path)
        header = files.parsed(metadata.get(HEADER, ""))
        about = files.mapping(header["about"])
        if callable(form):
            form(tensors, about)
        else:
            files.check(tensors, form)
        whole = header["seal"] == _seal(tensors, about)
    except (KeyError, ValueError, RecursionError):
        whole = False
    if not whole:
        log.warning("%s: damaged; it is not used, and what it held is made again", path)
        return None
    return tensors, about


def _seal(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    digest = sha256(canonical(about).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(canonical([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
