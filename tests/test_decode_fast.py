import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from batchjob.data.decode import decode
from batchjob.geometry import Geometry
from batchjob.loader import jpeg as fast_jpeg
from tests.decoding import FILL, SQUARE, cause_of, outcome
from tests.pictures import encoded, jpeg, photo


@pytest.mark.parametrize("rotated", [False, True])
def test_a_bomb_of_a_jpeg_is_judged_by_its_header_with_the_fast_decoder_too(rotated, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(40, 30), "JPEG", **({"exif": exif.tobytes()} if rotated else {}))
    frame = data.index(b"\xff\xc0")  # height and width follow the length and the number of bits
    data = data[: frame + 5] + (30000).to_bytes(2, "big") + (20000).to_bytes(2, "big") + data[frame + 9 :]
    assert fast_jpeg.plain_size(data) == (None if rotated else (30000, 20000))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    monkeypatch.setattr(fast_jpeg, "pixels", lambda *_: pytest.fail("it was decoded"))
    assert cause_of(data, accelerate=fast_jpeg) == "too_large"


def test_pillow_looks_only_at_jpegs_that_may_be_rotated_or_are_not_rgb():
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


@pytest.mark.parametrize("size", [(56, 56), (80, 60)])
def test_pixels_of_the_fast_decoder_do_not_share_memory(size):
    first = decode(jpeg(*size, seed=1), SQUARE, FILL, accelerate=fast_jpeg).pixels
    before = first.copy()
    decode(jpeg(*size, seed=2), SQUARE, FILL, accelerate=fast_jpeg)
    assert np.array_equal(first, before)


def test_a_photo_above_the_kept_memory_is_decoded_all_the_same(monkeypatch):
    monkeypatch.setattr(fast_jpeg, "KEPT_BYTES", 100)
    data = jpeg(80, 60)
    apart = decode(data, SQUARE, FILL).pixels.astype(int) - decode(data, SQUARE, FILL, accelerate=fast_jpeg).pixels
    assert np.abs(apart).max() <= 2
