"""Writes and opens the files of a trained SAE.

Shapes: n tokens of a sample, d d_model, k codes a token.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from saefw import tensors as files
from saefw.care import write_atomically
from saefw.chance import seeded
from saefw.plugin import SaeConfig, UserError
from saefw.sae import Codes, Sae
from saefw.unit import canonical

FILE, CONFIG, SAMPLE = "sae.safetensors", "config.json", "sample.safetensors"
"""Its weights; what it is, in JSON; and some tokens with the codes that it gave them when it was trained."""

MOST = 64
"""How many tokens a sample may have; it is written with fewer."""

WIDEST = 1 << 20
"""The largest d_model that a file may speak of."""

TOLERANCE = 1e-3
"""How far, relative to their L2 norm, the codes of at least half of the sample's tokens may lie from those then.

Another machine rounds otherwise. Where two features are all but equal it may also choose the other one, so that the
codes of a token are far apart for no fault; hence the median.
"""


def write_sae(sae: Sae, config: SaeConfig, folder: Path, about: Mapping[str, Any], x_nd: Tensor) -> None:
    """Write a trained SAE for `open_sae`.

    Args:
        sae: in eval mode.
        config: its settings.
        folder: where to.
        about: what else is to be said of it, in JSON.
        x_nd: the sample: some recorded tokens.

    """
    with torch.no_grad():
        codes = sae.encode(x_nd)
    told = {
        **about,
        "variant": config.content()["use"],
        "settings": config.content(),
        "d_model": sae.d_model,
        "d_sae": sae.d_sae,
        "normalisation": "x_n = (x - mean) / scale",
        "inference": "codes = select((x_n - b_dec) W_enc + b_enc), x_hat = (codes W_dec + b_dec) scale + mean",
        "select": (type(config).__doc__ or "").partition("\n")[0],
        "tolerance": TOLERANCE,
    }
    _write(folder / FILE, sae.state_dict())
    _write(folder / SAMPLE, {"x": x_nd, "indices": codes.indices, "values": codes.values})
    write_atomically(folder / CONFIG, (json.dumps(json.loads(canonical(told)), indent=1) + "\n").encode())


def open_sae(config: SaeConfig, folder: Path, device: str = "cpu") -> Sae:
    """Return the trained SAE in a unit's folder, in eval mode, its weights frozen.

    Raises:
        UserError: a file is missing, damaged, or of an SAE with other settings; or the SAE gives other codes than when
            it was trained.

    """
    again = f"delete {folder} to train it again"
    path = folder / CONFIG
    try:
        told = files.parsed(_text(path))
        d_model = files.number(told.get("d_model"), 1, WIDEST, "d_model")
        path = folder / FILE
        tensors, _ = files.read(path)
        path = folder / SAMPLE
        sample, _ = files.read(path)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); {again}") from error
    if told.get("settings") != config.content():
        raise UserError(
            f"{folder / CONFIG}: is of an SAE with other settings than asked for; delete {folder} to train that one"
        )
    path, does_not_fit = folder / FILE, f"does not fit its SAE; {again}"
    # Before one is built: a width that no file of this size can have would cost memory.
    n_numbers = sum(tensor.numel() for tensor in tensors.values())
    if n_numbers < d_model * config.width(d_model):
        raise UserError(f"{path}: {does_not_fit} ({n_numbers} numbers are too few for a d_model of {d_model})")
    with seeded(config.seed, 0):
        sae = config.fresh(d_model)
    try:
        files.check(tensors, files.form(sae.state_dict()))
        path = folder / SAMPLE
        files.check(sample, _sample_form(sample, d_model))
        codes = Codes(sample["indices"], sample["values"], sae.d_sae)
        if codes.indices.numel() and not 0 <= int(codes.indices.min()) <= int(codes.indices.max()) < sae.d_sae:
            raise ValueError(f"'indices' must lie in 0..{sae.d_sae - 1}")
    except ValueError as error:
        raise UserError(f"{path}: {does_not_fit} ({error})") from error
    sae.load_state_dict(tensors)
    sae.to(device).eval().requires_grad_(False)
    if not (apart := _apart(sae.encode(sample["x"].to(device)), codes)) <= TOLERANCE:
        raise UserError(
            f"{path}: its tokens get other codes than when the SAE was trained (they are {apart:.2g} apart; "
            f"{TOLERANCE:g} is rounding), so its weights, or the code of '{config.content()['use']}', "
            f"are not what they were; {again}"
        )
    return sae


def _apart(now: Codes, then: Codes) -> float:
    """Return the distance of codes relative to their norm, the median over tokens; of none 0."""
    now_ns, then_ns = (
        torch.zeros(len(codes.indices), codes.d_sae).scatter_add_(1, codes.indices.cpu(), codes.values.cpu().float())
        for codes in (now, then)
    )
    if not len(now_ns):
        return 0.0
    norm_n = then_ns.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((now_ns - then_ns).norm(dim=1) / norm_n).median())


def _sample_form(sample: Mapping[str, Tensor], d_model: int) -> files.Form:
    """Return the form that a sample must have: of as many tokens and codes as it says itself."""
    n = files.number(next((len(x) for name, x in sample.items() if name == "x" and x.ndim), 0), 0, MOST, "tokens")
    k = next((x.shape[1] for name, x in sample.items() if name == "indices" and x.ndim == 2), 0)
    return {"x": (torch.float32, (n, d_model)), "indices": (torch.int64, (n, k)), "values": (torch.float32, (n, k))}


def _text(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # To open a pipe is to wait for whoever writes to it.
            raise ValueError("not a file")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_atomically(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
