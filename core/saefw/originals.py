"""Opens the images of a dataset: to record them, and again later."""

from typing import TYPE_CHECKING

from saefw.plugin import Dataset, Example, UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def opened(example: Example) -> "Image":
    """Return an image, decoded.

    Raises:
        UserError: it cannot be read.

    """
    from PIL.Image import DecompressionBombError

    try:
        image = example.load()
        image.load()  # PIL decodes late; here a broken file is still known by its key
    except (OSError, EOFError, SyntaxError, ValueError, DecompressionBombError) as error:
        raise UserError(f"image '{example.key}' cannot be read ({error})") from error
    return image


def again(dataset: Dataset, index: int, key: str) -> "Image":
    """Return an image that was recorded, by its number and its key then.

    Raises:
        UserError: it cannot be read any more, or the dataset has another image in its place, or none.

    """
    example = dataset[index] if index < len(dataset) else None
    if example is None or example.key != key:
        now = f"is '{example.key}'" if example else "is not there"
        raise UserError(
            f"image {index} of the dataset was '{key}' when it was recorded and {now} now; put the images back as they "
            f"were, or record them anew in another store"
        )
    return opened(example)
