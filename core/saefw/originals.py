"""Opens the images of a dataset: to record them, and again later."""

from typing import TYPE_CHECKING

from saefw.plugin import Dataset, Example, UserError

if TYPE_CHECKING:
    from PIL.Image import Image


class Unreadable(UserError):
    """An image cannot be read."""

    def __init__(self, key: str, why: str) -> None:
        """Say which, and why: without the path, since tables must be the same wherever the images lie."""
        super().__init__(f"image {key!r} cannot be read ({why})")
        self.why = why


def opened(example: Example) -> "Image":
    """Return an image, decoded.

    Raises:
        Unreadable: it is missing, broken or too large.
        UserError: the system does not let it be read now: no permission, a failing disk, too many open files.

    """
    from PIL import UnidentifiedImageError
    from PIL.Image import DecompressionBombError, Image

    try:
        image = example.load()
        if not isinstance(image, Image):
            raise UserError(f"image {example.key!r}: load() must give a PIL image (got {image!r})")
        with image:  # a file that PIL still reads from is closed, also when it is broken
            image.load()  # PIL decodes late; here a broken file is still known by its key
    except FileNotFoundError as error:
        raise Unreadable(example.key, "it is missing") from error
    except UnidentifiedImageError as error:
        raise Unreadable(example.key, "it is no image") from error
    except (OSError, EOFError, SyntaxError, ValueError, DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            # The system's word is of the disk, the rights or this process, not of what the file holds.
            raise UserError(
                f"image {example.key!r} could not be opened ({error.strerror}); run again once that is mended"
            ) from error
        raise Unreadable(example.key, str(error)) from error
    return image


def again(dataset: Dataset, index: int, key: str) -> "Image":
    """Return an image that was recorded, by its number and its key then.

    Raises:
        UserError: it cannot be read any more (Unreadable), or the dataset has another image in its place, or none.

    """
    return opened(listed(dataset, index, key))


def listed(dataset: Dataset, index: int, key: str) -> Example:
    """Return an image that was recorded, by its number and its key then, not yet loaded.

    Raises:
        UserError: the dataset has another image in its place, or none.

    """
    example = dataset[index] if index < len(dataset) else None
    if example is None or example.key != key:
        now = f"is {example.key!r}" if example else "is not there"
        raise UserError(
            f"image {index} of the dataset was {key!r} when it was recorded and {now} now; put the images back as they "
            f"were, or record them anew in another store"
        )
    return example
