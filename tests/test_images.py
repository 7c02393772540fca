"""Image files of every kind, against what Pillow alone makes of them."""

import io
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from saefw.images import EXTENSIONS, FORMATS, open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)


def saved(image: Image.Image, form: str = "PNG", **settings: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **settings)
    return data.getvalue()


def pillow(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def opened(data: bytes) -> np.ndarray[Any, Any]:
    image = open_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    "mode, form",
    [
        ("1", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGB", "PNG"), ("P", "GIF"), ("L", "GIF"), ("RGB", "BMP"),
        ("L", "JPEG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"),
        ("RGB", "WEBP"), ("RGB", "PPM"), ("L", "PPM"), ("1", "PPM"), ("RGB", "JPEG2000"), ("LAB", "TIFF"),
    ],
)  # fmt: skip
def test_opaque_modes_are_what_pillow_says(mode: str, form: str) -> None:
    image = Image.new("LAB", (18, 12), (120, 3, 5)) if mode == "LAB" else PHOTO.convert(mode)
    data = saved(image, form)
    assert np.array_equal(opened(data), pillow(data)) and opened(data).shape == (12, 18, 3)


def test_avif() -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = saved(PHOTO, "AVIF")
    assert np.array_equal(opened(data), pillow(data))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_lie_on_white(mode: str) -> None:
    layer = PHOTO.convert("L").convert(mode) if mode != "PA" else PHOTO.convert("P").convert("PA")
    alpha = Image.fromarray(np.tile(np.array([0, 128, 255], np.uint8), (12, 6)))
    layer.putalpha(alpha)
    below = layer.convert("RGBA")
    a = np.asarray(alpha, dtype=float)[..., None] / 255
    expected = np.asarray(below, dtype=float)[..., :3] * a + 255 * (1 - a)
    found = opened(saved(layer, "TIFF" if mode == "PA" else "PNG"))
    assert np.abs(found - expected).max() <= 1 and (found[:, ::3] == 255).all()


def test_a_transparent_colour_lies_on_white() -> None:
    palette = PHOTO.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    for data in (saved(palette, transparency=3), saved(palette, "GIF", transparency=3)):
        clear = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., 3] == 0
        assert clear.any() and (opened(data)[clear] == 255).all()
        assert np.array_equal(opened(data)[~clear], np.asarray(palette.convert("RGB"))[~clear])
    several = saved(palette, transparency=bytes([0, 128, 255, 255, 255, 255, 255, 255]))
    assert (opened(several)[np.asarray(palette) == 0] == 255).all()
    grey = saved(Image.fromarray(np.array([[7, 9]], np.uint8)), transparency=7)
    assert opened(grey).tolist() == [[[255] * 3, [9] * 3]]
    rgb = saved(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), transparency=(1, 2, 3))
    assert opened(rgb).tolist() == [[[255] * 3, [4, 5, 6]]]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(form: str) -> None:
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for dtype in ("<u2", ">u2"):
        data = saved(Image.fromarray(values.astype(dtype)), form)
        assert np.array_equal(opened(data)[..., 0], np.arange(256).reshape(16, 16))
    # A dark one stays dark, as it would on a screen.
    dark = saved(Image.fromarray(np.full((2, 2), 255, np.uint16)), form)
    assert (opened(dark) == 0).all()


def test_thirty_two_bits_and_floats() -> None:
    wide = Image.fromarray(np.array([[0, 257, 65535, 70000, -5]], np.int32))
    assert opened(saved(wide, "TIFF"))[0, :, 0].tolist() == [0, 1, 255, 255, 0]
    narrow = Image.fromarray(np.array([[0, 7, 255, -5]], np.int32))
    assert opened(saved(narrow, "TIFF"))[0, :, 0].tolist() == [0, 7, 255, 0]
    unit = Image.fromarray(np.array([[0, 0.5, 1, -2]], np.float32))
    assert opened(saved(unit, "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 0]
    bytes_ = Image.fromarray(np.array([[0, 1.4, 254.6, 300]], np.float32))
    assert opened(saved(bytes_, "TIFF"))[0, :, 0].tolist() == [0, 1, 255, 255]
    with pytest.raises(ValueError) as told:
        open_image(saved(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"))
    assert str(told.value) == "it has values that are not finite"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_it_upright(form: str, orientation: int) -> None:
    """Each turn is written out, not asked of Pillow: rows of the result are these of the stored picture."""
    stored = np.kron(np.array([[10, 80, 150], [40, 110, 240]], np.uint8), np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.T, 6: stored[::-1].T, 7: stored[::-1, ::-1].T, 8: stored[:, ::-1].T,
    }[orientation]  # fmt: skip
    settings: dict[str, Any] = {"lossless": True} if form == "WEBP" else {"quality": 95} if form != "PNG" else {}
    data = saved(Image.fromarray(stored).convert("RGB"), form, exif=exif, **(settings if form != "TIFF" else {}))
    found = opened(data)[..., 0].astype(int)
    assert found.shape == upright.shape and np.abs(found - upright).max() <= 6


def test_exif_that_cannot_be_read_counts_as_none() -> None:
    data = saved(PHOTO, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\x7f" * 3)
    assert np.array_equal(opened(data), pillow(data))
    for junk in (b"Exif\0\0", b"Exif\0\0not a header", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01"):
        data = saved(PHOTO, "JPEG", exif=junk)
        assert opened(data).shape == (12, 18, 3)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_an_animation_the_first_picture(form: str) -> None:
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "green", "blue")]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert np.abs(opened(data).astype(int) - [255, 0, 0]).max() <= 3


def test_a_colour_profile_is_left_alone() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    data = saved(PHOTO, icc_profile=profile)
    assert np.array_equal(opened(data), PIXELS)


def test_by_path(tmp_path: Path) -> None:
    path = tmp_path / "photo.of.a cat.JPG"
    PHOTO.save(path, "PNG")
    assert np.array_equal(np.asarray(open_image(path)), PIXELS)
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "none.jpg")
    with pytest.raises(IsADirectoryError):
        open_image(tmp_path)


@pytest.mark.parametrize(
    "data, text",
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html>\n<html>", "it is no image, but text that begins with '<!DOCTYPE html>'"),
        (b"\n  <?xml version='1.0'?>", "it is no image, but text that begins with '<?xml version='1.0'?>'"),
        (b"Not Found", "it is no image, but text that begins with 'Not Found'"),
        (
            b"\xff\xd8\xff\xe0\x00",
            "it is no image that is opened here, or damaged at its start (ff d8 ff e0 00 ...)",
        ),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "it is no image, but text that begins with '%!PS-Adobe-3.0 EPSF-3.0'",
        ),
    ],
    ids=["empty", "html", "xml", "text", "start", "eps"],
)  # fmt: skip
def test_what_is_no_image_is_told(data: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "it.jpg"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(OSError) as told:
            open_image(source)
        assert str(told.value) == text


def test_a_truncated_file_is_told() -> None:
    data = saved(PHOTO.resize((200, 200)), "JPEG")
    with pytest.raises(OSError) as told:
        open_image(data[: len(data) // 2])
    assert str(told.value).startswith("image file is truncated")


def test_more_pixels_than_pillow_opens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(PHOTO)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12 * 18 // 2)
    assert np.array_equal(opened(data), PIXELS), "up to twice MAX_IMAGE_PIXELS Pillow would warn, and open it"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12 * 18 // 2 - 1)
    with pytest.raises(Image.DecompressionBombError) as told:
        open_image(data)
    assert str(told.value) == (
        "Image size (216 pixels) exceeds limit of 214 pixels, could be decompression bomb DOS attack."
    )


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    """A gigapixel in a few hundred bytes: only its header is there."""
    bomb = b"P6 40000 40000 255\n" + bytes(100)
    with pytest.raises(Image.DecompressionBombError):
        open_image(bomb)


def test_threads_open_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    palette = PHOTO.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    data = [saved(palette, transparency=bytes(range(8))), saved(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05")]
    with ThreadPoolExecutor(4) as pool:
        found = [np.asarray(image) for image in pool.map(open_image, data * 20)]
    assert all(np.array_equal(found[i], found[i % 2]) for i in range(40))
    assert not recwarn.list


def damage(cut: Callable[[bytes, int, int], bytes], of: bytes, at: int, to: int) -> None:
    """Whatever is done to a file, it opens or says what is wrong in one of three ways."""
    try:
        assert open_image(cut(of, at, to)).mode == "RGB"
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        assert str(error)


DATA = {form: saved(PHOTO, form) for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000")}
DATA["16-bit PNG"] = saved(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257))
EXIF = Image.Exif()
EXIF[0x0112] = 6
DATA["JPEG with EXIF"] = saved(PHOTO, "JPEG", exif=EXIF)


@pytest.mark.parametrize("form", DATA)
@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 3000), to=st.integers(0, 255))
def test_damaged_files_never_break_out(form: str, at: int, to: int) -> None:
    of = DATA[form]
    damage(lambda data, at, to: data[:at], of, at % len(of), to)
    damage(lambda data, at, to: data[:at] + bytes([to]) + data[at + 1 :], of, at % len(of), to)


def test_endings_are_of_formats_that_are_opened() -> None:
    Image.init()
    known = {end for end, form in Image.registered_extensions().items() if form in FORMATS}
    assert EXTENSIONS - known <= {".jpx", ".avif", ".mpo"}
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"} <= EXTENSIONS
