"""Pictures of images with lit patches: one image, a sheet of many.

What the model saw is drawn grey; where a feature fires, the patch glows. Patches lie on the picture in row-major order.
"""

from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saefw.care import PASSING, Unread
from saefw.errors import UserError, escaped

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

INK, FAINT, PAPER = (29, 31, 36), (112, 117, 128), (255, 255, 255)
"""The colours of a sheet: text, lesser text, ground."""

GLOW = ((66, 10, 92), (203, 53, 60), (252, 165, 30), (253, 245, 170))
"""From a faint patch to the brightest: violet, red, orange, pale yellow, rising in lightness for all kinds of sight."""


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


def read(path: Path, examples: Sequence[int]) -> dict[int, "Image"]:
    """Return the pictures of some examples from a `picture.parquet`, those that are in it.

    Raises:
        UserError: the file cannot be read.

    """
    import duckdb

    try:
        with duckdb.connect() as db:
            rows = db.execute(
                "SELECT example, png FROM read_parquet(?) WHERE list_contains(?, example)",
                [str(path), [int(example) for example in examples]],
            ).fetchall()
        return {example: opened(data) for example, data in rows}
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
    grey_hw1 = np.asarray(large.convert("L"), dtype=np.float32)[..., None] / 255
    # Patch borders stay sharp: the patch is what the model knows, not the pixel.
    rows, columns = patches.shape
    y = np.arange(large.height) * rows // large.height
    x = np.arange(large.width) * columns // large.width
    value_hw1 = patches[y][:, x][..., None].astype(np.float32) / 255
    off_hw3 = (0.10 + 0.42 * grey_hw1) * np.ones(3, dtype=np.float32)
    colour_hw3 = _glow(value_hw1[..., 0])
    # Dark strokes stay dark and bright ones bright under the colour, so that what lies there can be read.
    on_hw3 = colour_hw3 * (0.62 + 0.38 * grey_hw1) + 0.25 * grey_hw1 * (1 - colour_hw3)
    cover_hw1 = np.where(value_hw1 > 0, 0.15 + 0.85 * value_hw1**0.6, 0)
    shown_hw3 = off_hw3 * (1 - cover_hw1) + on_hw3 * cover_hw1
    return Image.fromarray((shown_hw3.clip(0, 1) * 255).round().astype(np.uint8))


def _glow(value_hw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    stops = np.linspace(0, 1, len(GLOW))
    return np.stack(
        [np.interp(value_hw, stops, [colour[i] / 255 for colour in GLOW]) for i in range(3)], axis=-1
    ).astype(np.float32)


def sheet(tiles: Sequence[Tile], title: str, subtitle: str, columns: int, side: int = 112) -> "Image":
    """Return tiles in rows on white, a title above and a caption below each."""
    from PIL import Image, ImageDraw

    gap, head, foot = 10, 58, 20
    rows = max(1, -(-len(tiles) // columns))
    width = gap + columns * (side + gap)
    made = Image.new("RGB", (width, head + rows * (side + foot) + gap), PAPER)
    draw = ImageDraw.Draw(made)
    draw.text((gap, 10), title, INK, _font(18))
    draw.text((gap, 34), fitted(subtitle, width - 2 * gap, 12), FAINT, _font(12))
    for i, tile in enumerate(tiles):
        picture = lit(tile.view, tile.patches, side)
        left, top = gap + i % columns * (side + gap), head + i // columns * (side + foot)
        made.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
        draw.text((left, top + side + 3), fitted(tile.caption, side, 11), FAINT, _font(11))
    return made


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
