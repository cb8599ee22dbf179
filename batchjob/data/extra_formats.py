"""Loads the packages that some image formats need: HEIC, which iPhones write, and JPEG XL."""

import functools

from batchjob.data.reading import ReadFailure

_HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
_JXL_BARE, _JXL_BOXED = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def format_of(data: bytes) -> str:
    """Returns Pillow's name of the format, `HEIF` or `JXL`, and loads its package; "" for any other format.

    Raises ReadFailure, which names the extra to install, where the package is not installed.
    """
    if _is_heic(data):
        _raise_for_missing("HEIC", "heic", _load_heif())
        return "HEIF"
    if data.startswith((_JXL_BARE, _JXL_BOXED)):
        _raise_for_missing("JPEG XL", "jxl", _load_jxl())
        return "JXL"
    return ""


def jxl_size(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) in pixels that a JPEG XL file states, or None where its bytes end before.

    The size is read here, because the format's package decodes all pixels as soon as it opens a file.

    Source: ISO/IEC 18181-1, SizeHeader. Its first bit says whether a side is written in 5 bits, as a multiple of 8;
    else a side takes 9 to 30 bits. The width may be written as a ratio to the height.
    """
    head = data[2:14] if data.startswith(_JXL_BARE) else _codestream(data)[2:14]
    if len(head) < 12:
        return None
    bits = int.from_bytes(head, "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    is_small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if is_small else 1 + take((9, 13, 18, 30)[take(2)])

    height = side()
    ratio = take(3)
    width = height * _RATIOS[ratio - 1][0] // _RATIOS[ratio - 1][1] if ratio else side()
    return height, width


def _codestream(data: bytes) -> bytes:
    """Returns the first bytes of the codestream, whose parts may lie in several boxes of a JPEG XL file."""
    found, at = b"", 0
    while at + 8 <= len(data) and len(found) < 14:
        size, kind, start = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, start = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        stop = len(data) if size == 0 else at + size
        if stop <= at + 7:
            break
        if kind in (b"jxlc", b"jxlp"):
            start += 4 * (kind == b"jxlp")  # the part's number
            found += data[start : min(stop, start + 14)]
        at = stop
    return found


def _is_heic(data: bytes) -> bool:
    if data[4:8] != b"ftyp":
        return False
    size = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[at : at + 4] for at in range(8, max(size, 12), 4)}
    return bool(brands & _HEIC_BRANDS) or (b"mif1" in brands and not brands & {b"avif", b"avis"})


def _raise_for_missing(name: str, extra: str, is_there: bool) -> None:
    if not is_there:
        way_out = f"pip install 'batchjob[{extra}]', or convert it, for instance to JPEG"
        raise ReadFailure("unsupported", f"{name} needs a package that is not installed: {way_out}")


@functools.cache
def _load_heif() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False)
    pillow_heif.options.DECODE_THREADS = 1  # there are as many processes as cores
    return True


@functools.cache
def _load_jxl() -> bool:
    try:
        from pillow_jxl import JpegXLImagePlugin
    except ImportError:
        return False
    JpegXLImagePlugin.DECODE_THREADS = 0  # in this thread
    return True
