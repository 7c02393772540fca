"""Oxford Flowers-102: flowers of 102 kinds."""

from pathlib import Path
from typing import Any, Literal

from saefw.plugin import Dataset, DatasetConfig, Files, ImageFiles, Place, Source, Split, UserError, hookimpl, inside

FOLDER = "flowers-102"

SITE = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"

NAMES = (
    "pink primrose", "hard-leaved pocket orchid", "canterbury bells", "sweet pea", "english marigold", "tiger lily",
    "moon orchid", "bird of paradise", "monkshood", "globe thistle", "snapdragon", "colt's foot", "king protea",
    "spear thistle", "yellow iris", "globe-flower", "purple coneflower", "peruvian lily", "balloon flower",
    "giant white arum lily", "fire lily", "pincushion flower", "fritillary", "red ginger", "grape hyacinth",
    "corn poppy", "prince of wales feathers", "stemless gentian", "artichoke", "sweet william", "carnation",
    "garden phlox", "love in the mist", "mexican aster", "alpine sea holly", "ruby-lipped cattleya", "cape flower",
    "great masterwort", "siam tulip", "lenten rose", "barbeton daisy", "daffodil", "sword lily", "poinsettia",
    "bolero deep blue", "wallflower", "marigold", "buttercup", "oxeye daisy", "common dandelion", "petunia",
    "wild pansy", "primula", "sunflower", "pelargonium", "bishop of llandaff", "gaura", "geranium", "orange dahlia",
    "pink-yellow dahlia", "cautleya spicata", "japanese anemone", "black-eyed susan", "silverbush",
    "californian poppy", "osteospermum", "spring crocus", "bearded iris", "windflower", "tree poppy", "gazania",
    "azalea", "water lily", "rose", "thorn apple", "morning glory", "passion flower", "lotus", "toad lily",
    "anthurium", "frangipani", "clematis", "hibiscus", "columbine", "desert-rose", "tree mallow", "magnolia",
    "cyclamen", "watercress", "canna lily", "hippeastrum", "bee balm", "ball moss", "foxglove", "bougainvillea",
    "camellia", "mallow", "mexican petunia", "bromelia", "blanket flower", "trumpet creeper", "blackberry lily",
)  # fmt: skip
"""By label 1 to 102, as the authors' page gives them; the files have numbers alone."""

PARTS: dict[str, Split] = {"trnid": "train", "valid": "valid", "tstid": "test"}


class Flowers102(DatasetConfig):
    """Oxford Flowers-102, by its own split: 10 train and 10 valid images of a class, and 6,149 test images.

    M.-E. Nilsback, A. Zisserman: Automated flower classification over a large number of classes, ICVGIP 2008.
    """

    use: Literal["flowers102"] = "flowers102"

    sources = (
        Source(
            f"{SITE}/102flowers.tgz",
            344_862_509,
            "sha256:2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246",
            "TensorFlow Datasets",
        ),
        Source(
            f"{SITE}/imagelabels.mat",
            502,
            "sha256:4903e94206bac23bf772aadf06451916df56b58fc483a62db32a97b82656651d",
            "TensorFlow Datasets",
        ),
        Source(
            f"{SITE}/setid.mat",
            14_989,
            "sha256:46b8678f91fd95d3c8f4feab80d271a6c834a1dd896fe29fd3e6ad9ce5c8dccd",
            "TensorFlow Datasets",
        ),
    )
    n_images = 8_189
    terms = "Visual Geometry Group, Oxford; for research alone."

    root: Place
    """The folder that holds jpg/, imagelabels.mat and setid.mat, or one with the folder flowers-102 that does."""

    def build(self, base: Path) -> Dataset:
        """Read its lists; no image is looked for yet.

        Raises:
            UserError: a list is missing, has a fault, or does not fit the other.

        """
        root = inside(self.root.open(base), FOLDER, holds=["imagelabels.mat"])
        labels = _numbers(root / "imagelabels.mat", "labels", len(NAMES))
        splits: dict[int, Split] = {}
        for name, split in PARTS.items():
            for number in _numbers(root / "setid.mat", name, len(labels)):
                if number in splits:
                    raise UserError(f"{root / 'setid.mat'}: image {number} is in two splits, or in one twice")
                splits[number] = split
        numbers = sorted(splits)
        files = Files.of(root, [f"jpg/image_{number:05d}.jpg" for number in numbers])
        return ImageFiles(files, [labels[number - 1] - 1 for number in numbers], [splits[n] for n in numbers], NAMES)


def _numbers(path: Path, name: str, most: int) -> list[int]:
    """Return a vector of whole numbers from 1 to `most` in a MATLAB file."""
    from scipy.io import loadmat

    try:
        with path.open("rb") as file:
            found: Any = loadmat(file, variable_names=[name])[name]
        numbers = [int(number) for number in found.ravel()]
        exact = found.dtype.kind in "uif" and bool((found.ravel() == numbers).all())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except KeyError:
        raise UserError(f"{path}: holds no '{name}'") from None
    except Exception as error:  # of damaged files scipy raises what it happens to meet
        raise UserError(f"{path}: is no MATLAB file, or damaged ({error})") from error
    wrong = next((number for number in numbers if not 1 <= number <= most), None)
    if wrong is not None or not exact or not numbers:
        got = "" if wrong is None else f" (got {wrong})"
        raise UserError(f"{path}: '{name}' must be whole numbers from 1 to {most}{got}")
    return numbers


@hookimpl
def saefw_datasets() -> list[type[DatasetConfig]]:
    """Bring one: flowers102."""
    return [Flowers102]
