"""Image sets, and the listing of those that are files in a folder."""

import os
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, Protocol
from unicodedata import normalize

from saefw.errors import UserError, did_you_mean
from saefw.images import EXTENSIONS, open_image
from saefw.splits import Split

if TYPE_CHECKING:
    from PIL.Image import Image

JUNK = frozenset(["__MACOSX", "@eaDir", "lost+found"])
"""Folders that systems put beside files, and that hold no images of the set; hidden ones count as such too."""


class Example(NamedTuple):
    """One image of a dataset."""

    key: str
    """Stable name of the image, unique in its dataset."""

    label: int
    """Index into the dataset's classes; -1: none."""

    split: Split
    """The plugin decides it, with a fixed rule or seed."""

    load: Callable[[], "Image"]
    """Opens the image, late, perhaps in a worker."""


class Dataset(Protocol):
    """An ordered set of images; the order never changes."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, by label."""
        ...

    def __len__(self) -> int:
        """How many images."""
        ...

    def __getitem__(self, index: int) -> Example:
        """The image at an index, not yet loaded."""
        ...


class Files(NamedTuple):
    """Image files below a folder, in the order of their keys."""

    root: Path
    """The folder."""

    keys: list[str]
    """Their paths from there, with `/`, in Unicode's composed form (NFC), so that no file system changes them."""

    odd: Mapping[str, str]
    """The path itself, by key, where it is another: macOS tends to store names decomposed."""

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        key = self.keys[index]
        return self.root / self.odd.get(key, key)

    def only(self, wanted: Callable[[str], bool]) -> "Files":
        """Return those whose keys are wanted."""
        return self._replace(keys=[key for key in self.keys if wanted(key)])

    def folders(self) -> Iterator[tuple[str, range]]:
        """Yield the folders that files lie in, as paths from `root`, each with the indices of files one after another.

        A folder that holds folders beside its files may come several times. A million files take a tenth of a second.
        """
        keys, first = self.keys, 0
        while first < len(keys):
            folder, slash, _ = keys[first].rpartition("/")
            # All that begins with `folder/` lies together, up to what follows "/": "0".
            end = bisect_left(keys, f"{folder}0", first) if slash else len(keys)
            if "".join(keys[first:end]).count("/") == (end - first) * keys[first].count("/"):
                yield folder, range(first, end)
            else:
                for folder, same in groupby(range(first, end), lambda index: keys[index].rpartition("/")[0]):
                    indices = list(same)
                    yield folder, range(indices[0], indices[-1] + 1)
            first = end

    @classmethod
    def of(cls, root: Path, paths: Sequence[str]) -> "Files":
        """Sort paths below a folder, by the bytes of their UTF-8, whatever the locale.

        Raises:
            UserError: a path is not UTF-8, or two have one key.

        """
        if all(map(str.isascii, paths)):  # as nearly always: each is its own key
            return cls(root, sorted(paths), {})
        keys = [path if path.isascii() else normalize("NFC", path) for path in paths]
        odd = {key: path for key, path in zip(keys, paths, strict=True) if key is not path and key != path}
        try:
            for key in keys:
                if not key.isascii():
                    key.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{root}: the name of a file is not UTF-8 ({os.fsencode(error.object)!r})") from None
        # The order of code points is that of the bytes of UTF-8.
        keys.sort()
        if odd and len(set(keys)) < len(keys):
            raise UserError(f"{root}: two files have names that differ in their Unicode form alone ({twice(keys)!r})")
        return cls(root, keys, odd)


class ImageFiles:
    """A dataset of files; what an image costs before it is asked for is its key and ten bytes."""

    def __init__(
        self,
        files: Files,
        labels: Sequence[int],
        splits: Sequence[Split] | Callable[[], Sequence[Split]],
        classes: Sequence[str] | Callable[[], Sequence[str]],
    ) -> None:
        """Take files with a label (-1: none) and a split for each, and the names of the classes.

        `splits` may also be what returns them, once one is asked for: of a million images, to carve takes seconds. So
        may `classes`, where it takes long to name them.
        """
        self._files, self._labels, self._given, self._named = files, array("q", labels), splits, classes

    @cached_property
    def classes(self) -> Sequence[str]:
        """Names of the classes, by label."""
        return self._named() if callable(self._named) else self._named

    @cached_property
    def _splits(self) -> Sequence[Split]:
        return self._given() if callable(self._given) else self._given

    def __len__(self) -> int:
        """How many images."""
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        """The image at an index."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no image {index}")
        return Example(
            self._files.keys[index],
            self._labels[index],
            self._splits[index],
            partial(open_image, self._files.path(index)),
        )

    def unsplit(self, index: int) -> Example:
        """The image at an index for one who only opens it: said to be of split train, which costs no carving."""
        return Example(
            self._files.keys[index], self._labels[index], "train", partial(open_image, self._files.path(index))
        )


def image_files(root: Path, below: Sequence[str] = ("",)) -> Files:
    """List the images below a folder, or below some folders in it, at any depth, by how their names end.

    Hidden files and folders are left out, and what systems put beside files (`__MACOSX`, `Thumbs.db`). Links are
    followed. No file is opened or asked for its size, so a million take seconds.

    Raises:
        UserError: there is no such folder, it cannot be read, it links to itself, or holds no image.

    """
    folder(root)
    others: Counter[str] = Counter()
    paths: list[str] = []
    for name in below:
        _walk(root, name, paths, others)
    if not paths:
        found = ", ".join(f"{n} {end or 'without an ending'}" for end, n in sorted(others.items())[:6])
        raise UserError(f"{root}: holds no image; it holds {found or 'nothing'}")
    return Files.of(root, paths)


def folder(root: Path) -> list[str]:
    """Return the names of what lies in a folder, hidden things left out, in order.

    Raises:
        UserError: there is no such folder, and one beside it with a name like it is named; or it cannot be read.

    """
    if root.is_dir():
        try:
            return sorted(name for name in os.listdir(root) if not name.startswith("."))
        except OSError as error:
            raise UserError(f"{root}: cannot be read ({error.strerror})") from error
    if root.exists():
        raise UserError(f"{root}: is a file; the folder of the images is asked for")
    beside = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
    raise UserError(f"{root}: there is no such folder{did_you_mean(root.name, beside)}")


def inside(root: Path, *names: str, holds: Sequence[str] = ()) -> Path:
    """Return the folder of a published dataset: `root`, or one in it by the name that it has when unpacked.

    Args:
        root: what the user gave.
        names: of folders in it that it may be; with nothing to know it by, `root` itself is the last guess.
        holds: files or folders by one of which it is known.

    Raises:
        UserError: there is no such folder.

    """
    there = folder(root)
    for place in (*(root / name for name in names), root):
        if any((place / name).exists() for name in holds or ("",)):
            return place
    found = ", ".join(there[:6]) + (", ..." if len(there) > 6 else "")
    wanted = " or ".join(holds)
    raise UserError(f"{root}: holds no {wanted}, nor does {names[0]} in it; it holds {found or 'nothing'}")


def _walk(root: Path, below: str, paths: list[str], others: Counter[str]) -> None:
    """Add the paths from `root` of the images below it or a folder in it, in no order; count how other files end."""
    stack = [(f"{below}/" if below else "", str(root / below))]
    while stack:
        prefix, path = stack.pop()
        try:
            entries = os.scandir(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        with entries:
            for entry in entries:
                name = entry.name
                # Nearly every entry of a million is this; it is asked for one thing alone.
                if name[name.rfind(".") :].lower() in EXTENSIONS and name[0] != "." and entry.is_file():
                    paths.append(prefix + name)
                    continue
                if name[0] == "." or name in JUNK:
                    continue
                end = name[dot:].lower() if (dot := name.rfind(".")) > 0 else ""
                if entry.is_dir():
                    if entry.is_symlink() and Path(path).resolve().is_relative_to(Path(entry.path).resolve()):
                        raise UserError(f"{entry.path}: links to a folder that it lies in")
                    stack.append((f"{prefix}{name}/", entry.path))
                    continue
                # Neither a pipe nor a device, which would never end; a link that leads nowhere will be missed.
                if end in EXTENSIONS and entry.is_symlink():
                    paths.append(prefix + name)
                else:
                    others[end] += 1


def twice(words: Sequence[str]) -> str:
    """Return a word that is there twice, or nothing."""
    word, times = Counter(words).most_common(1)[0] if words else ("", 0)
    return word if times > 1 else ""


def clean(path: str) -> bool:
    """Whether a path from a file stays in its folder and is written in the one way that a key is."""
    pure = PurePosixPath(path)
    return bool(path) and not pure.is_absolute() and ".." not in pure.parts and str(pure) == path and path != "."


def read_lines(path: Path, n: int, what: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the line, its fields) of a text file; the last of `n` fields may hold spaces.

    Raises:
        UserError: there is no such file, it is not UTF-8, or a line has fewer fields; `what` says what it should be.

    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split(maxsplit=n - 1)
        if not fields:
            continue
        if len(fields) < n:
            raise UserError(f"{path}:{number}: must be {what} (got {line!r})")
        fields[-1] = fields[-1].rstrip()
        yield number, fields
