"""Pictures of images with lit patches: one image, a sheet of many.

What the model saw is drawn grey; where a feature fires, the patch glows. Patches lie on the picture in row-major order.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saefw.care import PASSING, Unread
from saefw.errors import UserError, escaped

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

INK, FAINT, PAPER = (29, 31, 36), (112, 117, 128), (255, 255, 255)
"""The colours of a sheet: text, lesser text, ground."""

COLOURS, FAINTEST = "inferno", 0.4
"""Patches glow in the colours of this map of matplotlib, from here to its end: red, orange, pale yellow. It is uniform:
equal steps of a value look equally large, also to who sees no red or green, or in print without colour."""

COVER = 0.6
"""A patch of value v (1: the feature's largest) hides v to this power of the grey picture below it: the steps from the
grey on stay nearly equal."""

READ = 64
"""Pictures read from a file at a time."""


class Tile(NamedTuple):
    """One image of a sheet."""

    view: "Image"
    """What the model saw."""

    patches: Bytes | None
    """uint8 [rows, columns]: how strongly the feature fires on each patch, 255 at most; none for one of [CLS]."""

    caption: str
    """Written below it."""


def png(image: "Image") -> bytes:
    """Return an image as the bytes of a PNG file; equal images give equal bytes."""
    file = BytesIO()
    image.save(file, format="PNG", compress_level=3)
    return file.getvalue()


def webp(image: "Image") -> bytes:
    """Return an image as the bytes of a WebP file, a fraction of a PNG's; equal images give equal bytes."""
    file = BytesIO()
    image.save(file, format="WEBP", quality=82, method=2)
    return file.getvalue()


def read(path: Path, examples: Sequence[int]) -> dict[int, "Image"]:
    """Return the pictures of some examples from a `picture.parquet`, those that are in it.

    Raises:
        UserError: the file cannot be read.

    """
    return dict(each(path, examples))


def each(path: Path, examples: Sequence[int]) -> Iterator[tuple[int, "Image"]]:
    """Yield the pictures of some examples, those that are in a `picture.parquet`, few of them in memory at a time.

    Raises:
        UserError: the file cannot be read.

    """
    import duckdb

    try:
        with duckdb.connect() as db:
            found = db.execute(
                "SELECT example, png FROM read_parquet(?) SEMI JOIN (SELECT unnest(?::INTEGER[]) AS example) "
                "USING (example)",
                [str(path), [int(example) for example in examples]],
            )
            while rows := found.fetchmany(READ):
                for example, data in rows:
                    yield example, opened(data)
    except PASSING as error:
        raise Unread(path, error) from error
    except (duckdb.Error, ValueError) as error:
        raise UserError(f"{path}: cannot be read; delete {path.parent} to make it again") from error


def opened(data: bytes) -> "Image":
    """Return a picture that `png` made, decoded.

    Raises:
        ValueError: it is none.

    """
    from PIL import Image

    try:
        view = Image.open(BytesIO(data), formats=["PNG"])
        view.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    return view


def maps(path: Path, feature: int) -> Bytes:
    """Return how strongly the top images of a feature are lit, uint8 [t, p], from a `maps.safetensors`.

    Raises:
        UserError: the file cannot be read.

    """
    from saefw.tensors import opened

    try:
        with opened(path) as file:
            found: Bytes = file.get_slice("maps")[feature].numpy()
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: cannot be read; delete {path.parent} to make it again") from error
    return found


def enlarged(view: "Image", side: int) -> "Image":
    """Return a picture scaled smoothly so that its longer side is `side` pixels, in RGB."""
    from PIL.Image import Resampling

    scale = side / max(view.size)
    width, height = (max(1, round(length * scale)) for length in view.size)
    return view.convert("RGB").resize((width, height), Resampling.BICUBIC if scale > 1 else Resampling.LANCZOS)


def grid(db: "DuckDBPyConnection", unit: str) -> tuple[int, int]:
    """Return the patches, rows and columns, of the images that a visuals unit looked at."""
    ((rows, columns),) = db.execute(
        "SELECT a.grid_h, a.grid_w FROM acts a JOIN need n ON n.needs = a.unit WHERE n.unit = ?", [unit]
    ).fetchall()
    return rows, columns


def on_grid(map_p: Bytes, grid: tuple[int, int]) -> Bytes | None:
    """Return a map of a feature as its patches lie, [rows, columns]; one of [CLS], a single number, has none."""
    return map_p.reshape(grid) if len(map_p) > 1 else None


def lit(view: "Image", patches: Bytes | None, side: int) -> "Image":
    """Return a picture, its longer side `side` pixels, grey and dim but for the patches that glow.

    Args:
        view: what the model saw.
        patches: uint8 [rows, columns], 0 for a patch that is off, 255 for the brightest; None: the picture as it is.
        side: in pixels.

    """
    from PIL import Image

    large = enlarged(view, side)
    if patches is None:
        return large
    # Patch borders stay sharp: the patch is what the model knows, not the pixel.
    rows, columns = patches.shape
    y = np.arange(large.height) * rows // large.height
    x = np.arange(large.width) * columns // large.width
    shade_hw = patches.astype(np.uint16)[y][:, x] << 8 | np.asarray(large.convert("L"))
    return Image.fromarray(shades().reshape(-1, 3).take(shade_hw, axis=0))


@lru_cache
def shades() -> Bytes:
    """Return the colour of a pixel by the value of its patch and its own grey, uint8 [256, 256, 3]."""
    from matplotlib import colormaps

    value_v11 = np.linspace(0, 1, 256)[:, None, None]
    grey_g1 = np.linspace(0, 1, 256)[:, None]
    colour_v13 = colormaps[COLOURS](FAINTEST + (1 - FAINTEST) * value_v11[..., 0])[..., :3]
    # Dark strokes stay dark and bright ones bright under the colour, so that what lies there can be read.
    on_vg3 = colour_v13 * (0.75 + 0.25 * grey_g1) + 0.25 * grey_g1 * (1 - colour_v13)
    cover_v11 = value_v11**COVER
    shown_vg3 = (0.10 + 0.42 * grey_g1) * (1 - cover_v11) + on_vg3 * cover_v11
    found: Bytes = (shown_vg3.clip(0, 1) * 255).round().astype(np.uint8)
    return found


def bar() -> Bytes:
    """Return the colours of a patch of middle grey from value 0 to the largest, uint8 [256, 3]."""
    found: Bytes = shades()[:, 128]
    return found


def sheet(
    tiles: Sequence[Tile], title: str, subtitle: str, columns: int, side: int = 112, largest: float | None = None
) -> "Image":
    """Return tiles in rows on white, a title above and a caption below each.

    Args:
        tiles: of one feature.
        title: shown as it is, as `subtitle`.
        subtitle: cut to the width.
        columns: tiles in a row.
        side: of a tile, in pixels.
        largest: what the brightest colour stands for, in SAE units; a bar says it. None: no patch is lit, no bar.

    """
    from PIL import Image, ImageDraw

    gap, head, foot = 10, 58, 20
    rows = max(1, -(-len(tiles) // columns))
    width = gap + columns * (side + gap)
    made = Image.new("RGB", (width, head + rows * (side + foot) + gap), PAPER)
    draw = ImageDraw.Draw(made)
    draw.text((gap, 10), title, INK, _font(18))
    draw.text((gap, 34), fitted(subtitle, width - 2 * gap, 12), FAINT, _font(12))
    if largest is not None:
        text, ramp = f"{largest:.3g} SAE units", Image.fromarray(bar()[None].repeat(10, axis=0)).resize((120, 10))
        right = width - gap - round(_font(11).getlength(text))
        made.paste(ramp, (right - 126, 17))
        draw.text((right, 15), text, FAINT, _font(11))
        draw.text((right - 132, 15), "0", FAINT, _font(11), anchor="ra")
    for i, tile in enumerate(tiles):
        picture = lit(tile.view, tile.patches, side)
        left, top = gap + i % columns * (side + gap), head + i // columns * (side + foot)
        made.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
        draw.text((left, top + side + 3), fitted(tile.caption, side, 11), FAINT, _font(11))
    return made


@lru_cache(maxsize=4096)
def fitted(text: str, width: int, size: int) -> str:
    """Return text in one line, cut with an ellipsis to a width in pixels at a font size."""
    font, text = _font(size), escaped(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@lru_cache
def _font(size: int) -> "FreeTypeFont":
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
