"""An image of a user's file is what viewers show, or refused."""

import numpy as np
import pytest

from compress.data.samples import open_image
from compress.errors import UsageError
from support.refusals import refused

Image = pytest.importorskip("PIL.Image")
image_utils = pytest.importorskip("transformers.image_utils")
ORIENTATION = 0x0112


def picture():
    """6 x 4 pixels, no two sides alike."""
    return Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3) * 3)


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["png", "tiff", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_transformers_turns_it(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"turned.{kind}"
    picture().save(path, exif=exif)
    found = open_image(path, "image")
    assert found.size == ((6, 4) if orientation < 5 else (4, 6))
    assert np.array_equal(found, image_utils.load_image(str(path)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_of_8_bits_are_as_transformers_reads_them(tmp_path, mode):
    path = tmp_path / "picture.tiff"
    if mode == "YCbCr":
        path = path.with_suffix(".jpg")
    picture().convert(mode).save(path)
    found = open_image(path, "image")
    assert found.mode == "RGB"
    assert np.array_equal(found, image_utils.load_image(str(path)))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("uint16", "png"),
        ("uint16", "tiff"),
        (">u2", "tiff"),
        ("int32", "tiff"),
        ("float32", "tiff"),
    ],
)
def test_pixels_of_more_than_8_bits_are_refused(tmp_path, dtype, kind):
    path = tmp_path / f"deep.{kind}"
    Image.fromarray((np.arange(24).reshape(4, 6) * 2000).astype(dtype)).save(path)
    with refused(UsageError, "samples.jsonl:3: image deep", "8 bits"):
        open_image(path, "samples.jsonl:3: image deep")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", "half"])
def test_a_file_that_is_no_whole_image_is_refused(tmp_path, content):
    path = tmp_path / "broken.png"
    noise().save(path)
    path.write_bytes(path.read_bytes()[:4000] if content == "half" else content)
    with refused(UsageError, "image broken"):
        open_image(path, "image broken")
