"""Reads files of tensors, whatever lies in them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shape = Sequence[int | None]
"""The sizes of a tensor; null: any."""

Form = Mapping[str, tuple[torch.dtype, Shape]]
"""By name, the dtype and the sizes that tensors must have."""


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; no tensor is read yet.

    Raises:
        ValueError: there is none, or it is damaged, as may turn out where it is read; the text says how.

    """
    from safetensors import SafetensorError, safe_open

    try:
        # To open a pipe is to wait for whoever writes to it.
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from error


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        ValueError: there is none, or it is damaged; the text says how.

    """
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def parsed(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object that a text holds.

    Raises:
        ValueError: it holds none.

    """
    try:
        return mapping(json.loads(text))
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def mapping(value: Any) -> dict[str, Any]:
    """Return what must be a JSON object.

    Raises:
        ValueError: it is none.

    """
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} instead of a JSON object")
    return value


def number(value: Any, least: int, most: int, name: str) -> int:
    """Return a whole number of a JSON object.

    Raises:
        ValueError: it is none, or out of bounds.

    """
    if type(value) is not int or not least <= value <= most:
        told = repr(value)
        told = told if len(told) <= 30 else f"{told[:27]}..."
        raise ValueError(f"{name} must be a whole number from {least} to {most}, and is {told}")
    return value


def form(tensors: Mapping[str, Tensor]) -> Form:
    """Return the form that tensors have."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def check(tensors: Mapping[str, Tensor], wanted: Form) -> None:
    """See that tensors are those wanted: no more, no fewer, of these dtypes and sizes, every number finite.

    Raises:
        ValueError: they are not; the text says which is wrong, and how.

    """
    for name in sorted({*tensors, *wanted}):
        if name not in tensors:
            raise ValueError(f"'{name}' is missing")
        if name not in wanted:
            raise ValueError(f"'{name}' is one too many")
        tensor, (dtype, shape) = tensors[name], wanted[name]
        fits = len(shape) == tensor.ndim and all(want in (None, n) for want, n in zip(shape, tensor.shape, strict=True))
        if tensor.dtype != dtype or not fits:
            sizes = ", ".join("any" if want is None else str(want) for want in shape)
            raise ValueError(
                f"'{name}' is {_name(tensor.dtype)} {list(tensor.shape)} instead of {_name(dtype)} [{sizes}]"
            )
        if dtype.is_floating_point and not bool(tensor.isfinite().all()):
            raise ValueError(f"'{name}' holds numbers that are not finite")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
