"""Opens image files as people expect to see them."""

import re
import struct
import warnings
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = frozenset(
    (
        ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".mpo",
        ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
    )
)  # fmt: skip
"""How the name of an image ends, in small letters."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "MPO", "PPM", "AVIF", "JPEG2000")
"""What is opened, by Pillow's names. Not all it knows: some formats start other programs (EPS), most are no photos."""

_PILLOW = re.compile(r"PIL\.")


def open_image(source: Path | bytes) -> "Image":
    """Return an image file, by its path or its bytes, decoded whole, upright and in RGB.

    Of an animation it is the first picture; transparent pixels lie on white; 16-bit grey is scaled to 8 bits, as
    are floats from 0 to 1; a colour profile is left alone.

    Raises:
        OSError: it is missing, cut short, damaged, or no image.
        ValueError: it is an image that cannot be shown in RGB.
        DecompressionBombError: it has more pixels than Pillow opens (`2 * PIL.Image.MAX_IMAGE_PIXELS`, 179 million).

    """
    from PIL import Image, UnidentifiedImageError

    _hush()
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
            image.load()
            return _rgb(_upright(image))
    except UnidentifiedImageError:
        raise OSError(_no_image(source)) from None
    except (OSError, ValueError, MemoryError, Image.DecompressionBombError):
        raise
    except Exception as error:  # of damaged files Pillow raises what its decoders happen to meet
        raise OSError(f"it is damaged ({type(error).__name__}: {error})") from error


@cache
def _formats() -> list[str]:
    """Return those of FORMATS that this Pillow knows."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _hush() -> None:
    """Keep Pillow from warning about files: what it warns of is either mended or raised.

    Not `catch_warnings`, which is not safe among threads.
    """
    if not any(entry[3] is _PILLOW for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)


def _upright(image: "Image") -> "Image":
    """Return it turned as its EXIF says; EXIF that cannot be read counts as none."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, IndexError, struct.error):
        return image


def _rgb(image: "Image") -> "Image":
    """Return it in RGB, on white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_bytes(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _bytes(grey: "np.ndarray[Any, Any]") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Return grey values as uint8.

    Integers are 16 bits wide, but 32-bit ones, of which none is larger than 255, are 8; floats lie between 0 and 1 or,
    if any is larger, between 0 and 255.
    """
    if grey.dtype.kind != "f":
        narrow = grey.dtype.itemsize == 4 and grey.max() <= 255
        return (grey.clip(0, 65535) // (1 if narrow else 257)).astype(np.uint8)
    if not np.isfinite(grey).all():
        raise ValueError("it has values that are not finite")
    return (grey * (255 if grey.max() <= 1 else 1)).clip(0, 255).round().astype(np.uint8)


def _no_image(source: Path | bytes) -> str:
    """Say what a file is that Pillow does not know."""
    if isinstance(source, bytes):
        start = source[:40]
    else:
        with open(source, "rb") as file:
            start = file.read(40)
    if not start:
        return "it is empty"
    line = (start.decode("ascii", "replace").strip() + "\n").splitlines()[0]
    if line.isprintable() and line and "\ufffd" not in line:
        return f"it is no image, but text that begins with '{line}'"
    return f"it is no image that is opened here, or damaged at its start ({start[:8].hex(' ')} ...)"
