"""How fast contact sheets are drawn: what one lit tile of 128 pixels costs, with its share of all else."""

from pathlib import Path

import numpy as np
from PIL import Image

from saefw import pictures
from saefw.bench.frame import Bench, at_most
from saefw.pictures import Tile

TOP, SHARED = 16, 2
"""Images on a sheet, and sheets on which each of them stands, as where few features are drawn."""

SIZE_MB = 40
"""Of decoded images."""

VIEW, GRID, SIDE = 224, 14, 128
LIMIT = 5.0
"""Milliseconds a tile."""


def bench(bench: Bench) -> None:
    """Measure all that lies between pictures in a file and sheets in a folder."""
    n_images = max(TOP, (bench.size_mb or SIZE_MB) * 10**6 // (3 * VIEW * VIEW))
    n_features, rng = SHARED * n_images // TOP, np.random.default_rng(0)
    path, folder = bench.folder / "picture.parquet", bench.folder / "features"
    folder.mkdir()
    _stock(path, n_images, rng)
    maps_stp = rng.integers(0, 256, (n_features, TOP, GRID, GRID), dtype=np.uint8) * (
        rng.random((n_features, TOP, GRID, GRID)) < 0.1
    ).astype(np.uint8)
    examples = [rng.permutation(n_images)[:TOP].tolist() for _ in range(n_features)]
    small: dict[int, Image.Image] = {}

    def decoded() -> None:
        for example, view in pictures.each(path, range(n_images)):
            small[example] = pictures.enlarged(view, SIDE)

    def lit() -> None:
        for ours, maps_tp in zip(examples, maps_stp, strict=True):
            for example, map_hw in zip(ours, maps_tp, strict=True):
                pictures.lit(small[example], map_hw, SIDE)

    def drawn() -> None:
        for feature, (ours, maps_tp) in enumerate(zip(examples, maps_stp, strict=True)):
            tiles = [Tile(small[example], map_hw, "class") for example, map_hw in zip(ours, maps_tp, strict=True)]
            sheet = pictures.sheet(tiles, f"Feature {feature}", "fires on 1 % of patches", 8, SIDE, largest=1.0)
            (folder / f"{feature}.webp").write_bytes(pictures.webp(sheet))

    n_tiles = n_features * TOP
    taken = bench.seconds("sheets", {"decoded": decoded, "lit": lit, "drawn": drawn})
    bench.part(
        f"{n_features} sheets of {TOP} tiles of {SIDE} pixels; {n_images} images of {VIEW}, {GRID} x {GRID} patches"
    )
    bench.row("image decoded and made small", 1000 * taken["decoded"] / n_images, "ms/image")
    bench.row("tile lit", 1000 * taken["lit"] / n_tiles, "ms/tile")
    bench.row("tile lit and written", 1000 * taken["drawn"] / n_tiles, "ms/tile")
    whole = 1000 * (taken["decoded"] + taken["drawn"]) / n_tiles
    bench.row("tile in all", whole, "ms/tile", bound=at_most(LIMIT, "value"))


def _stock(path: Path, n_images: int, rng: np.random.Generator) -> None:
    """Write images that pack about as photographs do: soft shapes with a little grain."""
    import duckdb

    pngs = np.empty(n_images, dtype=object)
    for i in range(n_images):
        soft = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((VIEW, VIEW))
        grain = rng.normal(0, 4, (VIEW, VIEW, 3))
        pngs[i] = pictures.png(Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8)))
    with duckdb.connect() as db:
        db.register("rows", {"example": np.arange(n_images, dtype=np.int32), "png": pngs})
        db.execute(f"COPY (FROM rows) TO '{str(path).replace(chr(39), chr(39) * 2)}' (FORMAT parquet)")
