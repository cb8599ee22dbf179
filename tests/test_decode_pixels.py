import io

import numpy as np
import pytest
from PIL import Image, features

from batchjob.data.decode import FORMATS, decode, placing, resize
from batchjob.geometry import Geometry
from batchjob.loader import jpeg as fast_jpeg
from tests.decoding import FILL, SQUARE, cause_of, colour
from tests.pictures import encoded, photo


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_of_the_list_is_read(format):
    assert features.check("avif")
    red = encoded(Image.new("RGB", (40, 30), (200, 40, 60)), format)
    assert np.abs(np.array(colour(red)) - (200, 40, 60)).max() <= 6


@pytest.mark.parametrize(
    ("mode", "value", "expected", "format"),
    [
        ("L", 100, (100, 100, 100), "PNG"),
        ("1", 1, (255, 255, 255), "PNG"),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0), "TIFF"),
        ("CMYK", (0, 255, 255, 0), (254, 0, 0), "JPEG"),
        ("L", 100, (100, 100, 100), "JPEG"),
    ],
)
def test_grey_bilevel_and_cmyk_pictures_become_rgb(mode, value, expected, format):
    data = encoded(Image.new(mode, (40, 30), value), format)
    assert np.abs(np.array(colour(data, accelerate=fast_jpeg)) - expected).max() <= 1


def test_a_palette_gives_its_colours():
    picture = Image.new("P", (40, 30), 7)
    picture.putpalette([c for i in range(256) for c in (i, 2 * i % 256, 90)])
    assert colour(encoded(picture, "PNG")) == [7, 14, 90]


def test_alpha_is_laid_on_the_fill_colour():
    half = Image.new("RGBA", (40, 30), (255, 0, 0, 128))
    expected = [round(c * 128 / 255 + f * 127 / 255) for c, f in zip((255, 0, 0), FILL, strict=True)]
    assert np.abs(np.array(colour(encoded(half, "PNG"))) - expected).max() <= 1
    assert colour(encoded(Image.new("LA", (40, 30), (50, 0)), "PNG")) == list(FILL)
    clear = Image.new("P", (40, 30), 3)
    clear.putpalette([99] * 768)
    assert colour(encoded(clear, "PNG", transparency=3)) == list(FILL)
    assert colour(encoded(clear, "GIF", transparency=3)) == list(FILL)
    keyed = encoded(Image.new("RGB", (40, 30), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert colour(keyed) == list(FILL)
    assert colour(encoded(Image.new("RGBA", (40, 30), (9, 8, 7, 0)), "WEBP", lossless=True)) == list(FILL)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_to_8_and_not_turned_white(format):
    values = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (256, 1))
    data = encoded(Image.fromarray(values), format)
    pixels = decode(data, Geometry(256, 256, 16, 16), FILL).pixels
    assert np.array_equal(pixels[0], values >> 8)
    assert np.array_equal(pixels[0], pixels[2])


def test_16_bit_transparency_is_laid_on_the_fill_colour():
    values = np.full((30, 40), 40000, np.uint16)
    image = Image.fromarray(values)
    assert colour(encoded(image, "PNG", transparency=40000)) == list(FILL)
    assert colour(encoded(image, "PNG", transparency=39999)) == [156] * 3


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_pictures_are_stretched_from_their_least_to_their_greatest_value(dtype):
    values = np.tile(np.linspace(-1000, 3000, 256).astype(dtype), (256, 1))
    pixels = decode(encoded(Image.fromarray(values), "TIFF"), Geometry(256, 256, 16, 16), FILL).pixels
    assert np.abs(pixels[0].astype(int) - np.arange(256)).max() <= 1


def test_nan_is_black_and_a_picture_of_nan_alone_is_degenerate():
    values = np.array([[0, np.nan], [1, np.inf]], np.float32).repeat(28, 0).repeat(28, 1)
    pixels = decode(encoded(Image.fromarray(values), "TIFF"), SQUARE, FILL).pixels[0]
    assert pixels[0, -1] == pixels[-1, -1] == 0
    assert pixels[-1, 0] == 255
    assert cause_of(encoded(Image.fromarray(values * np.nan), "TIFF")) == "degenerate"


@pytest.mark.parametrize("fast", [None, fast_jpeg], ids=["pillow", "fast"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_exif_rotation_is_applied_in_all_eight_cases(format, fast):
    upright = photo(60, 40, seed=3)
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    expected = decode(encoded(upright, "PNG"), SQUARE, FILL).pixels.astype(int)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }
    for orientation, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = decode(encoded(image, format, exif=exif.tobytes(), **lossless), SQUARE, FILL, accelerate=fast)
        assert (found.height, found.width) == (40, 60)
        assert np.abs(found.pixels - expected).max() <= (9 if format == "JPEG" else 0), orientation


def test_a_photo_with_damaged_exif_is_read():
    data = encoded(photo(40, 30), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert decode(data, SQUARE, FILL).width == 40


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_is_taken(format):
    frames = [Image.new("RGB", (40, 30), c) for c in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert colour(data) == [250, 0, 0]


def test_a_phone_s_jpeg_of_two_pictures_gives_the_first():
    data = encoded(photo(40, 30), "MPO", save_all=True, append_images=[photo(40, 30, seed=1)])
    first = decode(encoded(photo(40, 30), "JPEG"), SQUARE, FILL).pixels.astype(int)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    for fast in (None, fast_jpeg):
        assert np.abs(decode(data, SQUARE, FILL, accelerate=fast).pixels - first).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (65000, 1), (1, 65000)])
@pytest.mark.parametrize("mode", ["squash", "crop", "pad"])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_the_smallest_and_the_thinnest_pictures_are_read_or_degenerate(size, mode, format):
    geometry = Geometry(56, 56, 14, 14, mode)
    data = encoded(Image.new("RGB", size, (9, 9, 9)), format)
    if mode == "pad" and size != (1, 1):
        assert cause_of(data, geometry) == "degenerate"
    else:
        found = decode(data, geometry, FILL, accelerate=fast_jpeg)
        assert (found.width, found.height) == size
        assert found.pixels.shape == (3, 56, 56)


def test_padding_has_the_fill_colour_and_crop_takes_the_middle():
    wide = Image.new("RGB", (90, 30), (0, 0, 0))
    wide.paste((255, 255, 255), (30, 0, 60, 30))
    padded = decode(encoded(wide, "PNG"), Geometry(60, 60, 15, 15, "pad"), FILL).pixels
    assert (padded[:, 20:].reshape(3, -1).T == FILL).all()
    assert not (padded[:, :20].reshape(3, -1).T == FILL).all(1).any()
    cropped = decode(encoded(wide, "PNG"), Geometry(60, 60, 15, 15, "crop"), FILL).pixels
    assert (cropped == 255).all()


def test_a_resize_is_pillow_s_own():
    for width, height in ((100, 80), (80, 100), (60, 600), (56, 56), (20, 30)):
        image = photo(width, height)
        place = placing(SQUARE, height, width)
        assert place.is_vertical_first == (height == 600)
        expected = image
        if place.is_vertical_first:  # the order of Pillow 13.0
            expected = image.resize((width, 56), Image.Resampling.BICUBIC)
        expected = expected.resize((56, 56), Image.Resampling.BICUBIC)
        assert np.array_equal(resize(image, place, "bicubic"), np.asarray(expected).transpose(2, 0, 1))
