"""Pictures of all kinds become RGB as a viewer shows them, or are refused with the reason."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from face_data.pictures import to_rgb


RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
HALF = np.uint8([[[255, 0, 0, 255], [0, 0, 255, 0]]])


def reopened(picture: Image.Image, form: str, **options) -> Image.Image:
    """As a file is read."""
    file = io.BytesIO()
    picture.save(file, form, **options)
    file.seek(0)
    return Image.open(file)


def indexed(colors: np.ndarray) -> Image.Image:
    picture = Image.fromarray(np.arange(2, dtype=np.uint8)[None])
    picture.putpalette(colors[0, :, :3].tobytes())
    return picture


def shades(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)[..., 0]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_brightness(form):
    rgb, note = to_rgb(reopened(Image.fromarray(RAMP), form))
    np.testing.assert_array_equal(shades(rgb), np.round(RAMP / 257))
    assert rgb.mode == "RGB" and note == "brought from 16 bits to 8"


@pytest.mark.parametrize(
    ("picture", "form", "options"),
    [
        (Image.fromarray(HALF), "PNG", {}),
        (Image.fromarray(HALF), "WEBP", {"lossless": True}),
        (indexed(HALF), "PNG", {"transparency": 1}),
        (indexed(HALF), "GIF", {"transparency": 1}),
        (Image.fromarray(HALF[..., :3]), "PNG", {"transparency": (0, 0, 255)}),
    ],
    ids=["RGBA", "WebP", "palette", "GIF", "color key"],
)
def test_what_lies_under_transparent_pixels_stays_covered(picture, form, options):
    rgb, note = to_rgb(reopened(picture, form, **options))
    assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    assert note == "transparent pixels composed on white"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "YCbCr"])
def test_plain_pictures_are_what_they_were(mode):
    picture = Image.new("RGB", (4, 4), "white").convert(mode)
    rgb, note = to_rgb(picture if mode == "YCbCr" else reopened(picture, "PNG"))
    assert rgb.mode == "RGB" and rgb.getpixel((0, 0)) == (255, 255, 255) and note is None


def test_inks_become_colors():
    rgb, note = to_rgb(reopened(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(np.subtract(rgb.getpixel((0, 0)), (255, 0, 0))).max() <= 2 and note == "brought from CMYK to RGB"
    # A profile that is no profile of inks is as none.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgb, _ = to_rgb(reopened(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100, icc_profile=profile))
    assert np.abs(np.subtract(rgb.getpixel((0, 0)), (255, 0, 0))).max() <= 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.float32([[0.0, 0.5], [0.7, 1.0]]), "floating point numbers, which have no agreed scale: save 8 bits"),
        (np.int32([[0, 1_000_000]]), "go from 0 to 1000000: save 8 bits"),
        (np.int32([[-1, 7]]), "go from -1 to 7"),
        (np.int32([[0, 200]]), "go from 0 to 200"),
    ],
)
def test_values_without_a_scale_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(reopened(Image.fromarray(values), "TIFF"))


def test_of_an_animation_the_first_picture_is_taken_and_that_is_said():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    rgb, note = to_rgb(reopened(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert rgb.getpixel((0, 0)) == (255, 0, 0) and note == "of several frames, the first taken"


def test_a_turned_picture_is_upright_whatever_its_kind():
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode, form in (("RGB", "JPEG"), ("RGBA", "PNG"), ("L", "PNG")):
        rgb, _ = to_rgb(reopened(Image.new(mode, (8, 4)), form, exif=exif))
        assert rgb.size == (4, 8) and rgb.getexif().get(0x0112, 1) == 1
