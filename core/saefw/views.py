"""Keeps what the model saw of some images of a recording."""

import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from saefw import pictures
from saefw.care import writing
from saefw.originals import again
from saefw.plugin import Backbone, BackboneConfig, Dataset, DatasetConfig, Run, Unit

Array = np.ndarray[Any, Any]

PNGS = 4096
"""Pictures of images, as PNG, that are held for the next SAE."""


class Views:
    """The images of a recording as its model saw them, opened when first asked for."""

    def __init__(self, recording: Unit, keys: Sequence[str], run: Run) -> None:
        """Open nothing yet; `keys` are those of the images when they were recorded."""
        self._backbone_config: BackboneConfig = recording.given["backbone"]
        self._dataset_config: DatasetConfig = recording.given["dataset"]
        self._keys, self._run = keys, run
        self._parts: tuple[Backbone, Dataset] | None = None
        # The SAEs of a sweep share many of their top images.
        self._png = lru_cache(maxsize=PNGS)(self._drawn)

    def _drawn(self, example: int) -> bytes:
        if self._parts is None:
            self._parts = self._backbone_config.fresh("cpu"), self._run.dataset(self._dataset_config)
        backbone, dataset = self._parts
        return pictures.png(backbone.view(again(dataset, example, self._keys[example])).convert("RGB"))

    def write(self, path: Path, unit: Unit, examples: Array) -> None:
        """Write the views of some images as a parquet file (unit, example, png), few of them in memory at a time."""
        import duckdb

        work = path.with_suffix(".part")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        with writing(path), duckdb.connect(str(work / "picture.duckdb")) as db:
            db.execute("CREATE TABLE picture (unit TEXT, example INTEGER, png BLOB)")
            for first in range(0, len(examples), 1024):
                some = examples[first : first + 1024]
                pngs = np.array([self._png(example) for example in some.tolist()], dtype=object)
                rows = {"unit": np.full(len(some), unit.address, dtype=object), "example": some, "png": pngs}
                db.register("rows", rows)
                db.execute("INSERT INTO picture BY NAME SELECT * FROM rows")
                self._run.progress(first + len(some), len(examples), "pictures")
            target = str(work / path.name).replace("'", "''")
            # Short groups of rows: who wants a few pictures reads few of them.
            db.execute(f"COPY (FROM picture ORDER BY example) TO '{target}' (FORMAT parquet, ROW_GROUP_SIZE 2048)")
        (work / path.name).replace(path)
        shutil.rmtree(work)
