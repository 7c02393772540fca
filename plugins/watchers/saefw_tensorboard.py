"""Curves of a run in TensorBoard, for those who ask: SAEFW_TENSORBOARD=curves saefw run; tensorboard --logdir curves.

Wants tensorboardX: pip install 'saefw[tensorboard]'. Each unit is a run of its own there, named by its label; what a
run that goes on from a checkpoint logs again stands beside what was there.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saefw.plugin import Unit, UserError, hookimpl

FOLDER = "SAEFW_TENSORBOARD"
"""The variable of the environment that names the folder of the curves; unset: there are none."""

_writers: dict[str, Any] = {}


@hookimpl
def saefw_logged(unit: Unit, step: int, values: Mapping[str, float]) -> None:
    """Write what was measured at a step.

    Raises:
        UserError: curves are asked for, and tensorboardX is not there, or they cannot be written.

    """
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    if unit.address not in _writers:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError(f"{FOLDER}: curves want tensorboardX: pip install 'saefw[tensorboard]'") from error
        # A file system takes names of 255 bytes.
        name = re.sub(r"[^\w=.+-]+", " ", unit.label).encode()[:200].decode(errors="ignore").strip(" .")
        try:
            writer = SummaryWriter(str(Path(folder) / f"{name} {unit.address}".lstrip()), flush_secs=10)
        except OSError as error:
            raise UserError(f"{FOLDER}: no curves can be written to {folder} ({error.strerror})") from error
        _writers[unit.address] = writer
    for name, value in values.items():
        _writers[unit.address].add_scalar(name, value, step)


@hookimpl
def saefw_kept(unit: Unit, folder: Path, seconds: float) -> None:
    """Close the curves of a unit that is made."""
    if (writer := _writers.pop(unit.address, None)) is not None:
        writer.close()
