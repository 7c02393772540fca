"""Gets a public dataset: downloads, unpacks, counts."""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from saefw.archives import SUFFIXES, unpack
from saefw.care import write_atomically
from saefw.errors import UserError, did_you_mean
from saefw.fetch import fetch
from saefw.plugin import DatasetConfig, Source

NOTE = ".saefw-get.json"
"""The file that says what a folder was made from; written last."""

WORK = ".saefw-get"
"""The folder in it for what is coming; gone at the end."""

Told = Callable[[str, int, int], None]
"""Is told how much is done, and of how much: `told("bytes of 102flowers.tgz", 12, 100)`."""


def public(datasets: Mapping[str, type[Any]]) -> dict[str, type[DatasetConfig]]:
    """Return those of all datasets, by `use`, that can be downloaded."""
    return {use: cls for use, cls in datasets.items() if cls.sources}


def get(use: str, datasets: Mapping[str, type[Any]], to: Path, told: Told) -> int:
    """Bring a dataset into a folder, unless it is there already; return how many images it has.

    A download that broke off goes on from there. An archive is kept until everything is in place.

    Raises:
        UserError: there is no such dataset, the folder holds other things, or what came is not the dataset.
        OSError: the disk is full, or the folder cannot be written to.

    """
    there = public(datasets)
    if use not in there:
        what = "is a dataset of files of your own" if use in datasets else "is no dataset"
        raise UserError(f"'{use}' {what}{did_you_mean(use, there)} (to be had: {', '.join(there) or 'none'})")
    cls, work = there[use], to / WORK
    wanted = [source._asdict() for source in cls.sources]
    if _noted(to) == wanted and not work.exists():
        return _count(cls, to)
    if to.exists() and not to.is_dir():
        raise UserError(f"{to}: is a file; name a folder, new or empty")
    if to.is_dir() and not work.exists() and any(to.iterdir()):
        raise UserError(f"{to}: holds other things already; name a folder, new or empty")
    with _alone(work):
        if _noted(to) == wanted:  # brought meanwhile, or stopped while it was tidied up
            shutil.rmtree(work)
            return _count(cls, to)
        for source in cls.sources:
            _bring(source, to, told)
        n = _count(cls, to)
        if cls.n_images and n != cls.n_images:
            raise UserError(f"{to}: holds {n:,} images, and {use} has {cls.n_images:,}; delete it and get it again")
        write_atomically(to / NOTE, json.dumps(wanted, indent=1).encode())
        shutil.rmtree(work)
    return n


def _bring(source: Source, to: Path, told: Told) -> None:
    """Download a source and put what it holds into the folder."""
    work = to / WORK
    file = fetch(source, work, partial(told, f"bytes of {source.name}"))
    if not source.name.lower().endswith(SUFFIXES):
        shutil.copyfile(file, to / source.name)
        return
    unpacked = work / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    unpack(file, unpacked, partial(told, f"bytes unpacked of {source.name}"))
    for path in sorted(unpacked.iterdir()):
        if (to / path.name).is_dir():  # of an earlier try
            shutil.rmtree(to / path.name)
        path.replace(to / path.name)


def _count(cls: type[DatasetConfig], to: Path) -> int:
    config: Any = cls
    return len(config(root=str(to.absolute())).open(to))


def _noted(to: Path) -> Any:
    try:
        return json.loads((to / NOTE).read_text())
    except (OSError, ValueError):
        return None


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Keep a second `saefw get` out of a folder."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        file = (work / "lock").open("w")
    except OSError as error:
        raise UserError(f"{work.parent}: cannot be written to ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{work.parent}: another `saefw get` is at work there") from None
        yield
