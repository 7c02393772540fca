"""Opens an image that a visitor of the page brings, bounded in size, in memory alone."""

import binascii
from base64 import b64decode
from io import BytesIO

from PIL import Image, ImageOps, UnidentifiedImageError

from saefw.plugin import UserError

BYTES, PIXELS = 8 * 2**20, 40_000_000
"""The largest file, and the most pixels of an image."""

FORMATS = ("JPEG", "PNG", "WEBP")


def uploaded(data: str) -> Image.Image:
    """Return an image from base64, upright and in RGB.

    Raises:
        UserError: it is too large, or no such image.

    """
    if len(data) > BYTES * 4 // 3 + 4:
        raise UserError(f"the image is larger than {BYTES // 2**20} MiB; bring a smaller one")
    try:
        image = Image.open(BytesIO(b64decode(data, validate=True)), formats=FORMATS)
        # Known from the header, before a pixel is decoded.
        if image.width * image.height > PIXELS:
            raise UserError(
                f"the image has {image.width} × {image.height} pixels, at most {PIXELS // 10**6} million are read; "
                "bring a smaller one"
            )
        return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, binascii.Error) as error:
        raise UserError(f"that is no image that can be read (there are: {', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"the image has more than {PIXELS // 10**6} million pixels; bring a smaller one") from error
