"""Makes pictures and files for tests: ordinary ones, odd ones, and ones that are broken in every known way."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageFilter


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draws a picture with the smooth areas, edges and colours of a photo."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    x, y = (sorted(int(v) for v in rng.integers(0, side + 1, 2)) for side in (width, height))
    image.paste(tuple(int(v) for v in rng.integers(0, 256, 3)), (x[0], y[0], x[1], y[1]))
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Image.blend(image, noise.filter(ImageFilter.GaussianBlur(0.7)), 0.1)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def jpeg(width: int = 40, height: int = 30, seed: int = 0, **options: object) -> bytes:
    return encoded(photo(width, height, seed), "JPEG", **options)


def png(width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    return encoded(photo(width, height, seed), "PNG")


def bomb(width: int, height: int) -> bytes:
    """Makes a one-bit PNG of that size, a few kB on disk."""
    rows = zlib.compressobj(9)
    row = b"\0" * (1 + -(-width // 8))
    data = b"".join(rows.compress(row * 500) for _ in range(-(-height // 500))) + rows.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Returns name -> (bytes, cause) of files that are not whole pictures."""
    good_jpeg, good_png = jpeg(120, 90), png(120, 90)
    return {
        "cut.jpg": (good_jpeg[: len(good_jpeg) // 2], "truncated"),
        "cut.png": (good_png[: len(good_png) // 2], "truncated"),
        "cut.webp": (encoded(photo(120, 90), "WEBP")[:200], "truncated"),
        "cut.tiff": (encoded(photo(120, 90), "TIFF", compression="tiff_lzw")[:-900], "not_an_image"),
        "cut.gif": (encoded(photo(120, 90), "GIF")[:1200], "truncated"),
        "cut.bmp": (encoded(photo(120, 90), "BMP")[:-500], "truncated"),
        "empty.jpg": (b"", "not_an_image"),
        "page.jpg": (b"<!DOCTYPE html><title>404</title>", "not_an_image"),
        "header.jpg": (good_jpeg[:12], "not_an_image"),
        "header.png": (good_png[:20], "not_an_image"),
        "zeros.jpg": (bytes(5000), "not_an_image"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        "bomb.png": (bomb(20000, 20000), "too_large"),
        "half-bomb.png": (bomb(10000, 9000), "too_large"),
    }
