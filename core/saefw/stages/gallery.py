"""Makes a gallery of features: a folder of pages.

It opens in a browser from the disk as from any web server, and loads nothing from elsewhere.

Shapes: s d_sae.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from saefw import pictures, samples
from saefw.acts import Acts
from saefw.care import PART, writing
from saefw.choice import picked
from saefw.errors import escaped
from saefw.originals import Unreadable
from saefw.plugin import Names, Pace, Pick, Run, StageConfig, Unit, hookimpl, timed
from saefw.recording import cores
from saefw.stages.gallery_data import SCRIPTS, SHARD, Tables, features, index, neighbours, packed, script
from saefw.stages.visuals import d_sae, looked_at
from saefw.trained import open_sae
from saefw.unit import canonical

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, Any]

SITE = "site"
"""The folder of the pages, in that of the unit."""

PAGE = Path(__file__).parent / "gallery_page"
"""The page itself, the same in every gallery."""

IMAGES = 1000
"""Images whose files lie in one folder, by their number."""

PLAIN = 64
"""Pixels of a side up to which an image is kept without loss."""

AT_ONCE = 64
"""Images that are in memory decoded, waiting to be written."""

WEBP, DATA = 8000, 1500
"""Bytes of an image and of what is said of a feature, about."""


class Gallery(StageConfig):
    """Makes pages to look through features: search, a map to pick from, and a page each with its images lit."""

    use: Literal["gallery"] = "gallery"

    visuals: Annotated[str, Names("stages")]
    """The stage that looked at the features."""

    sae: Pick | list[Pick] = Pick(highest="n_pure")
    """Which SAE, by its own metrics (nmse, l0, dead) or those of its features (n_pure, n_live); a list: one of each
    pick; an empty one: all of them."""

    n_features: int = Field(5000, ge=0)
    """How many features of an SAE show images: those that detect a class best, or fire most where there are no classes.

    All others are listed too."""

    side: int = Field(256, ge=16, le=4096)
    """Pixels of the longer side of an image, at most; none is made larger than the model saw it."""

    quality: int = Field(80, ge=1, le=100)
    """Of the images, as WebP counts it; those of at most 64 pixels are kept without loss."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit: a gallery of all SAEs that are picked.

        Raises:
            NotYet: the features have not been looked at yet.
            UserError: no SAE fits.

        """
        seen = {unit.address: unit for unit in run.made_by(self.visuals, "visuals")}
        picks = [self.sae] if isinstance(self.sae, Pick) else self.sae
        needs = list(seen.values())
        if picks:
            chosen = list(seen)[: len(picks)]
            if run.decided(self.visuals, needs):
                with run.db() as db:
                    chosen = [picked(db, pick, self.use, sorted(seen))[0] for pick in picks]
            needs = [seen[address] for address in dict.fromkeys(chosen)]
        content = {name: value for name, value in self.content().items() if name not in ("use", "sae")}
        if needs:
            label = needs[0].label if len(needs) == 1 else f"{needs[0].label}, and {len(needs) - 1} more"
            yield Unit(self.use, content, tuple(needs), label=label)

    def disk(self, unit: Unit, run: Run) -> int:
        """Return about the bytes of the images and of what is said of the features."""
        total = 0
        for seen in unit.needs:
            n_features, shown = self._shown(seen)
            total += n_features * DATA + int(self._images(seen, run)) * WEBP + shown * seen.content["top"] * 60
        return total

    def duration(self, units: Sequence[Unit], run: Run, pace: Pace) -> float:
        """Return the seconds of the images, and of what is said of the features."""
        total = 0.0
        for seen in (seen for unit in units for seen in unit.needs):
            recording = seen.needs[1]
            seconds = pace(f"an image as WebP, {recording.label}", partial(self._image_seconds, recording, run))
            total += self._images(seen, run) * seconds / cores()
            total += self._shown(seen)[0] * pace("the maps of a feature, packed", _said_seconds)
        return total

    def _shown(self, seen: Unit) -> tuple[int, int]:
        """Return how many features an SAE has, and how many of them show images at most."""
        n = d_sae(seen.needs[0])
        return n, min(n, self.n_features)

    def _images(self, seen: Unit, run: Run) -> float:
        """Return about how many images are shown."""
        n = samples.sizes(seen.needs[1], run)[seen.content["split"]]
        return samples.distinct(n, self._shown(seen)[1] * seen.content["top"])

    def _image_seconds(self, recording: Unit, run: Run) -> float:
        try:
            data = pictures.png(samples.view(recording, run, 0))
        except Unreadable:
            return math.nan
        return timed(lambda: self._webp(pictures.opened(data)))

    # Making

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Make each gallery; of a stopped run the images are there already."""
        for unit in units:
            site = run.folder(unit) / SITE
            site.mkdir(exist_ok=True)
            views = list(dict.fromkeys(_views(seen) for seen in unit.needs))
            shown = [self._seen(seen, views.index(_views(seen)), run) for seen in unit.needs]
            n_images = self._write_images(shown, site, run)
            saes = [self._write(i, one, site, run) for i, one in enumerate(shown)]
            told = {"colours": _colours(), "shard": SHARD, "scripts": SCRIPTS, "images": IMAGES, "saes": saes}
            script(site / "data" / "gallery.js", "gallery", told)
            for path in sorted(PAGE.iterdir()):
                with writing(site / path.name):
                    (site / path.name).write_bytes(path.read_bytes())
            n_shown = sum(int(one.chosen_s.sum()) for one in shown)
            run.log(unit, 0, n_features=sum(one.tables.d_sae for one in shown), n_shown=n_shown, n_images=n_images)
            run.keep(unit)

    def _seen(self, seen: Unit, views: int, run: Run) -> "Seen":
        """Read what a visuals unit found, and choose the features that show images."""
        acts, folder = Acts(run.folder(seen.needs[1])), run.folder(seen)
        tables = Tables.read(folder, acts.labels)
        ap_s = tables.best()
        alive = np.flatnonzero(tables.features["frequency"] > 0)
        order = np.lexsort((alive, -tables.features["frequency"][alive], -ap_s[alive]))
        chosen_s = np.zeros(tables.d_sae, dtype=bool)
        chosen_s[alive[order[: self.n_features]]] = True
        return Seen(seen, acts, tables, ap_s, chosen_s, views)

    def _write_images(self, shown: Sequence["Seen"], site: Path, run: Run) -> int:
        """Write every image that some feature shows, once, whatever SAE it is of; return how many there are."""
        wanted: dict[Path, tuple[Seen, int]] = {}
        for one in shown:
            for example in one.examples().tolist():
                wanted.setdefault(one.image(site, example), (one, example))
        for folder in {path.parent for path in wanted}:
            folder.mkdir(parents=True, exist_ok=True)
        left: dict[Path, dict[int, Path]] = {}
        for path, (one, example) in wanted.items():
            if not _whole(path):
                left.setdefault(one.tables.folder, {})[example] = path
        done = len(wanted) - sum(map(len, left.values()))

        def write(path: Path, view: "Image") -> None:
            part = path.with_name(path.name + PART)
            with writing(path):
                part.write_bytes(self._webp(view))
                part.replace(path)

        with ThreadPoolExecutor(cores()) as threads:
            for folder, paths in left.items():
                drawn = pictures.each(folder / "picture.parquet", list(paths))
                while some := list(islice(drawn, AT_ONCE)):
                    list(threads.map(write, [paths[example] for example, _ in some], [view for _, view in some]))
                    done += len(some)
                    run.progress(done, len(wanted), "images")
        return len(wanted)

    def _webp(self, view: "Image") -> bytes:
        """Return an image as the bytes of a WebP file."""
        if max(view.size) > self.side:
            view = pictures.enlarged(view, self.side)
        file = BytesIO()
        view.convert("RGB").save(file, "WEBP", quality=self.quality, lossless=max(view.size) <= PLAIN)
        return file.getvalue()

    def _write(self, number: int, one: "Seen", site: Path, run: Run) -> dict[str, Any]:
        """Write what is said of an SAE; return what every page says of it."""
        into = site / "data" / str(number)
        alive_s = one.tables.features["frequency"] > 0
        sae = open_sae(one.unit.needs[0].given["sae"], run.folder(one.unit.needs[0]), run.device)
        near = neighbours(sae.W_dec, alive_s, lambda n: run.progress(n, int(alive_s.sum()), "neighbours"))
        found = features(
            one.tables, one.chosen_s, near, one.acts.keys, one.on_patches, into,
            lambda n: run.progress(n, one.tables.d_sae, "features"),
        )  # fmt: skip
        script(into / "index.js", str(number), index(one.tables, one.ap_s, one.chosen_s, found))
        return {
            "name": escaped(one.unit.label),
            "classes": [escaped(name) for name in one.acts.classes] if (one.acts.labels >= 0).any() else [],
            "grid": list(one.acts.grid) if one.on_patches else None,
            "images": one.views,
            "size": _size(one, site),
            "rank_by": one.unit.content["rank_by"],
            "split": one.unit.content["split"],
            "n_features": one.tables.d_sae,
        }


class Seen(NamedTuple):
    """What a gallery shows of one SAE."""

    unit: Unit
    """Of the stage visuals."""

    acts: Acts
    tables: Tables
    ap_s: Array
    """Average precision as a detector of the class that it detects best; 0: of none."""

    chosen_s: Array
    """bool: which features show images."""

    views: int
    """The number of the folder of its images: SAEs of one backbone and dataset show the same."""

    @property
    def on_patches(self) -> bool:
        """Whether features light patches."""
        return looked_at(self.unit) == "patches"

    def image(self, site: Path, example: int) -> Path:
        """Return the file of an image."""
        return site / "images" / str(self.views) / str(example // IMAGES) / f"{example}.webp"

    def examples(self) -> Array:
        """Return the images that are shown, ascending."""
        return np.unique(self.tables.top["example"][self.chosen_s[self.tables.top["feature"]]])


def _views(seen: Unit) -> str:
    """Return what tells apart what models saw of images: the same for two layers of one backbone."""
    recorded = seen.needs[1].content
    return canonical([recorded["backbone"], recorded["dataset"]])


def _whole(path: Path) -> bool:
    """Whether a file that a stopped run left is an image; without a power cut in between it always is."""
    from PIL import Image

    try:
        with Image.open(path, formats=["WEBP"]) as image:
            image.load()
    except (OSError, SyntaxError):
        return False
    return True


def _size(one: Seen, site: Path) -> list[int]:
    """Return the width and height of the first image that is shown; all that a model saw are alike."""
    from PIL import Image

    for example in one.examples()[:1].tolist():
        with Image.open(one.image(site, example)) as image:
            return list(image.size)
    return [1, 1]


def _colours() -> list[str]:
    """Return the colours of patches from faint to brightest, in even steps for the eye: matplotlib's inferno.

    Without its darkest, which nobody would see on a dark image.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["inferno"](np.linspace(0.2, 1, 256))]


def _said_seconds() -> float:
    """Return the seconds in which maps of a feature are packed, about all that it costs to say what it does."""
    maps_tp = np.random.default_rng(0).poisson(0.1, (16, 196)).astype(np.uint8)
    return timed(lambda: packed(maps_tp))


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """One: gallery."""
    return [Gallery]
