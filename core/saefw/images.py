"""Opens image files as people expect to see them."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def open_image(source: Path | bytes) -> "Image":
    """Return an image file, by its path or its bytes, decoded whole, upright and in RGB.

    Of an animation it is the first picture; transparent pixels lie on white; 16-bit grey is scaled to 8 bits.

    Raises:
        OSError: it is missing, cut short, or no image.
        ValueError: it is an image that cannot be shown in RGB.

    """
    from PIL import Image, ImageOps

    with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or upright.mode == "I":
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 257).astype(np.uint8))
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return upright.convert("RGB")
