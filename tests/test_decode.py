import io
import os
import socket
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin, features

from batchjob.codes import STATUS
from batchjob.data.decode import FORMATS, MAX_PIXELS, Decoded, decode, placing, resize
from batchjob.data.reading import ReadFailure, read_file
from batchjob.geometry import Geometry
from batchjob.loader import jpeg as fast_jpeg
from tests.pictures import bad_files, bomb, encoded, jpeg, photo, png

SQUARE = Geometry(56, 56, 14, 14)
FILL = (10, 200, 30)
BAD = bad_files()


def cause_of(data, geometry=SQUARE, **options) -> str:
    with pytest.raises(ReadFailure) as failure:
        decode(data, geometry, FILL, **options)
    assert failure.value.cause in STATUS
    assert failure.value.message
    assert "\n" not in failure.value.message
    return failure.value.cause


def colour(data, **options):
    """The mean of a flat picture, which must be flat."""
    pixels = decode(data, SQUARE, FILL, **options).pixels.reshape(3, -1).astype(int)
    assert np.ptp(pixels, axis=1).max() <= 4
    return pixels.mean(1).round().tolist()


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("fast", [None, fast_jpeg], ids=["pillow", "fast"])
def test_a_file_that_is_no_whole_picture_fails_with_its_cause(name, fast):
    data, cause = BAD[name]
    assert cause_of(data, accelerate=fast) == cause


def test_a_text_chunk_that_unpacks_to_gigabytes_is_too_large():
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    assert cause_of(encoded(photo(40, 30), "PNG", pnginfo=info)) == "too_large"
    many = PngImagePlugin.PngInfo()
    for i in range(PngImagePlugin.MAX_TEXT_MEMORY // 1_000_000 + 1):
        many.add_text(f"bomb{i}", "x" * 1_000_000, zip=True)
    assert cause_of(encoded(photo(40, 30), "PNG", pnginfo=many)) == "too_large"


@pytest.mark.parametrize("size", [(20000, 20000), (10000, 9000), (9460, 9460)])
def test_a_bomb_is_judged_by_its_header_and_never_decoded(size, monkeypatch):
    assert 9459**2 < MAX_PIXELS < 9460**2
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cause_of(bomb(*size)) == "too_large"


@pytest.mark.parametrize("rotated", [False, True])
def test_a_bomb_of_a_jpeg_is_judged_by_its_header_with_the_fast_decoder_too(rotated, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(40, 30), "JPEG", **({"exif": exif.tobytes()} if rotated else {}))
    frame = data.index(b"\xff\xc0")  # its height and width come after a length and the bits of a sample
    data = data[: frame + 5] + (30000).to_bytes(2, "big") + (20000).to_bytes(2, "big") + data[frame + 9 :]
    assert fast_jpeg.plain_size(data) == (None if rotated else (30000, 20000))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    monkeypatch.setattr(fast_jpeg, "pixels", lambda *_: pytest.fail("it was decoded"))
    assert cause_of(data, accelerate=fast_jpeg) == "too_large"


def test_only_what_may_be_rotated_or_has_no_rgb_needs_a_look_by_pillow():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = photo(40, 30)
    assert fast_jpeg.plain_size(encoded(picture, "JPEG")) == (30, 40)
    assert fast_jpeg.plain_size(encoded(picture, "JPEG", progressive=True, comment=b"\xff\xe1")) == (30, 40)
    assert fast_jpeg.plain_size(encoded(picture.convert("L"), "JPEG")) == (30, 40)
    assert fast_jpeg.plain_size(encoded(picture, "JPEG", exif=exif.tobytes())) is None
    assert fast_jpeg.plain_size(encoded(picture, "JPEG", xmp=b'<x tiff:Orientation="6"/>')) is None
    assert fast_jpeg.plain_size(encoded(picture.convert("CMYK"), "JPEG")) is None
    assert fast_jpeg.plain_size(encoded(picture, "PNG")) is None
    filled = encoded(picture, "JPEG", exif=exif.tobytes()).replace(b"\xff\xe1", b"\xff\xff\xe1", 1)
    assert fast_jpeg.plain_size(filled) is None
    for bytes_ in (b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xe0\0\0", encoded(picture, "JPEG")[:200]):
        assert fast_jpeg.plain_size(bytes_) is None


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


def test_floats_that_are_no_numbers_are_black_and_nothing_but_them_is_degenerate():
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


def test_damaged_exif_costs_no_photo():
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
        if place.is_vertical_first:  # Pillow's own order since 13.0
            expected = image.resize((width, 56), Image.Resampling.BICUBIC)
        expected = expected.resize((56, 56), Image.Resampling.BICUBIC)
        assert np.array_equal(resize(image, place, "bicubic"), np.asarray(expected).transpose(2, 0, 1))


def test_what_cannot_be_opened_says_why(tmp_path):
    good = tmp_path / "good.jpg"
    good.write_bytes(jpeg())
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to("pool.jpg")
    (tmp_path / "pool.jpg").symlink_to("loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
    causes = {
        "dangling.jpg": "unreadable",
        "loop.jpg": "unreadable",
        "folder.jpg": "unreadable",
        "fifo.jpg": "unreadable",
        "socket.jpg": "unreadable",
        "none.jpg": "missing",
        "good.jpg/x.jpg": "missing",
    }
    assert {name: cause_of(tmp_path / name) for name in causes} == causes
    assert isinstance(decode(good, SQUARE, FILL), Decoded)


def test_a_fifo_that_replaces_the_file_after_the_look_does_not_block(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x.jpg")
    (tmp_path / "good.jpg").write_bytes(jpeg())
    regular = os.stat(tmp_path / "good.jpg")
    monkeypatch.setattr(os, "stat", lambda path: regular)
    outcome = []

    def read():
        try:
            read_file(os.fsencode(tmp_path / "x.jpg"))
        except ReadFailure as failure:
            outcome.append(failure.cause)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert outcome == ["unreadable"]


def test_a_file_without_permission_is_unreadable(tmp_path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(jpeg())
    path.chmod(0)
    me = os.geteuid()
    if me == 0:  # root reads everything: ask as nobody
        os.seteuid(65534)
    try:
        assert cause_of(path) == "unreadable"
    finally:
        os.seteuid(me)


def test_a_huge_file_is_too_large_and_not_read(tmp_path):
    with open(tmp_path / "huge.png", "wb") as file:
        file.write(png())
        file.truncate(2**40)  # sparse: it takes no disk
    assert cause_of(tmp_path / "huge.png") == "too_large"


def test_memory_that_does_not_suffice_is_a_cause_and_no_crash(monkeypatch):
    def exhausted(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", exhausted)
    assert cause_of(jpeg()) == "too_large"


@pytest.mark.parametrize("mode", ["squash", "crop", "pad"])
def test_the_fast_decoder_is_within_a_hundredth_of_a_grey_level_of_pillow(mode):
    geometry = Geometry(224, 224, 16, 16, mode)
    for i, (width, height) in enumerate(((640, 480), (640, 427), (427, 640), (500, 375), (333, 500), (300, 200))):
        data = jpeg(width, height, seed=i, quality=90)
        slow = decode(data, geometry, FILL)
        fast = decode(data, geometry, FILL, accelerate=fast_jpeg)
        apart = np.abs(slow.pixels.astype(int) - fast.pixels)
        assert apart.mean() <= 0.01
        assert apart.max() <= 2
        assert (slow.height, slow.width) == (fast.height, fast.width) == (height, width)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    seed=st.integers(0, 9),
    mode=st.sampled_from(["squash", "crop", "pad"]),
    filter=st.sampled_from(["bicubic", "bilinear", "lanczos"]),
    orientation=st.integers(1, 8),
    options=st.fixed_dictionaries({"quality": st.integers(30, 100), "subsampling": st.sampled_from([0, 1, 2])}),
    progressive=st.booleans(),
    grey=st.booleans(),
)
def test_the_fast_decoder_agrees_with_pillow_on_any_jpeg(
    width, height, seed, mode, filter, orientation, options, progressive, grey
):
    geometry = Geometry(42, 70, 14, 14, mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = photo(width, height, seed).convert("L" if grey else "RGB")
    data = encoded(picture, "JPEG", exif=exif.tobytes(), progressive=progressive, **({} if grey else options))
    apart = np.abs(outcome(data, geometry, None, filter).astype(int) - outcome(data, geometry, fast_jpeg, filter))
    assert apart.max() <= 2


def outcome(data, geometry, fast, filter="bicubic"):
    """The pixels, or the number of the cause."""
    try:
        return decode(data, geometry, FILL, interpolation=filter, accelerate=fast).pixels
    except ReadFailure as failure:
        return np.full(1, STATUS[failure.cause], np.uint8)


SEEDS = [jpeg(), jpeg(progressive=True), png()] + [
    encoded(photo(40, 30), format) for format in ("WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM", "JPEG2000")
]


@settings(max_examples=250, deadline=None)
@given(
    data=st.sampled_from(SEEDS),
    cut=st.one_of(st.none(), st.floats(0, 1)),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
def test_whatever_the_bytes_are_there_is_a_picture_or_a_cause_and_both_decoders_agree(data, cut, changes):
    spoilt = bytearray(data if cut is None else data[: int(cut * len(data))])
    for where, value in changes:
        if spoilt:
            spoilt[int(where * len(spoilt))] = value
    slow = outcome(bytes(spoilt), SQUARE, None)
    fast = outcome(bytes(spoilt), SQUARE, fast_jpeg)
    assert slow.shape == fast.shape
    assert np.abs(slow.astype(int) - fast).max() <= 2


@pytest.mark.parametrize("size", [(56, 56), (80, 60)])
def test_the_fast_decoder_s_memory_is_its_own(size):
    first = decode(jpeg(*size, seed=1), SQUARE, FILL, accelerate=fast_jpeg).pixels
    before = first.copy()
    decode(jpeg(*size, seed=2), SQUARE, FILL, accelerate=fast_jpeg)
    assert np.array_equal(first, before)


def test_a_photo_above_the_kept_memory_is_decoded_all_the_same(monkeypatch):
    monkeypatch.setattr(fast_jpeg, "KEPT_BYTES", 100)
    data = jpeg(80, 60)
    apart = decode(data, SQUARE, FILL).pixels.astype(int) - decode(data, SQUARE, FILL, accelerate=fast_jpeg).pixels
    assert np.abs(apart).max() <= 2


def test_a_kind_of_image_that_is_not_read_is_not_called_damaged() -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "BMP")
    data = bytearray(file.getvalue())
    data[30:34] = (9).to_bytes(4, "little")  # a compression that no reader knows
    with pytest.raises(ReadFailure, match="format that is not read: Unsupported BMP compression") as error:
        decode(bytes(data), Geometry(32, 32, 16, 16), (0, 0, 0))
    assert error.value.cause == "unsupported"
