"""Writes and opens the file of a trained SAE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from saefw import tensors as files
from saefw.care import write_atomically
from saefw.chance import seeded
from saefw.plugin import SaeConfig, UserError
from saefw.sae import Sae
from saefw.sealed import HEADER
from saefw.unit import canonical

FILE = "sae.safetensors"

WIDEST = 1 << 20
"""The largest d_model that a file may speak of."""


def write_sae(sae: Sae, config: SaeConfig, folder: Path, about: Mapping[str, Any]) -> None:
    """Write a trained SAE for `open_sae`; `about` goes into the file's header beside its settings."""
    header = {**about, "config": config.content(), "normalisation": "(x - mean) / scale"}
    _write(folder / FILE, sae.state_dict(), header)


def open_sae(config: SaeConfig, folder: Path, device: str = "cpu") -> Sae:
    """Return the trained SAE in a unit's folder, in eval mode, its weights frozen.

    Raises:
        UserError: the file is missing, damaged, or of an SAE with other settings.

    """
    path = folder / FILE
    try:
        tensors, header = _read(path)
        d_model = files.number(header.get("d_model"), 1, WIDEST, "d_model")
        n_numbers = sum(tensor.numel() for tensor in tensors.values())
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); delete {folder} to train it again") from error
    if header.get("config") != config.content():
        raise UserError(f"{path}: holds an SAE with other settings than asked for; delete {folder} to train that one")
    does_not_fit = f"{path}: does not fit its SAE; delete {folder} to train it again"
    # Before one is built: a width that no file of this size can have would cost memory.
    if n_numbers < d_model * config.width(d_model):
        raise UserError(f"{does_not_fit} ({n_numbers} numbers are too few for a d_model of {d_model})")
    with seeded(config.seed, 0):
        sae = config.build(d_model)
    try:
        files.check(tensors, files.form(sae.state_dict()))
    except ValueError as error:
        raise UserError(f"{does_not_fit} ({error})") from error
    sae.load_state_dict(tensors)
    return sae.to(device).eval().requires_grad_(False)


def _write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(ready, metadata={HEADER: canonical(header)}))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = files.read(path)
    return tensors, files.parsed(metadata.get(HEADER, ""))
