"""Pictures that are broken, unusual or made to do harm, for `benchmarks.broken`."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from .broken_entry import READ, Entry

WIDE = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)  # 12 wide and 8 high


def _encoded(image: Image.Image, format: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def _rgb() -> Image.Image:
    return Image.fromarray(WIDE)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *between: bytes, bits: int = 1, colour: int = 0, rows: bytes | None = None) -> bytes:
    """A PNG that says it is so large, with chunks before its pixels; these are black where no rows are given."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    if rows is None:
        rows = bytes(min(height, 64) * (1 + (width * bits + 7) // 8)) if width * height < 1 << 34 else b""
    end = _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + b"".join(between) + end


def _bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info + bytes(64)


def _jp2(width: int, height: int) -> bytes:
    """Nothing but the header of a JPEG 2000 codestream."""
    size = struct.pack(">HIIIIIIIIH", 0, width, height, 0, 0, width, height, 0, 0, 1) + bytes((7, 1, 1))
    return b"\xff\x4f\xff\x51" + struct.pack(">H", len(size) + 2) + size


def _tiff(*tags: tuple[int, int, int, int], after: int = 0) -> bytes:
    """A little-endian TIFF of one directory; `after` is where the next is said to lie."""
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + body + struct.pack("<I", after) + bytes(64)


def _tags(width: int = 4, height: int = 4, photometric: int = 1, bits: int = 8, count: int = 16) -> list[tuple]:
    long = ((256, width), (257, height), (273, 130), (278, height), (279, count))
    short = ((258, bits), (259, 1), (262, photometric), (277, 1))
    return sorted([(tag, 4, 1, value) for tag, value in long] + [(tag, 3, 1, value) for tag, value in short])


def _grey(values: list[float], dtype: type) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=dtype))


def _exif(rotation: int) -> bytes:
    exif = _rgb().getexif()
    exif[0x0112] = rotation
    return _encoded(_rgb(), "JPEG", exif=exif)


def _broken_exif() -> bytes:
    return _encoded(_rgb(), "JPEG", exif=b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 9, 0x0112, 3, 1, 6) + b"\xff" * 5)


def _frames(format: str) -> bytes:
    others = [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue")]
    return _encoded(_rgb(), format, save_all=True, append_images=others)


def _readable() -> Iterator[tuple[str, str, bytes]]:
    """Name, file name and bytes of what is unusual, and read all the same."""
    yield "one pixel", "a.png", _encoded(Image.new("RGB", (1, 1), "red"), "PNG")
    yield "one bit", "a.png", _encoded(_rgb().convert("1"), "PNG")
    yield "grey with alpha", "a.png", _encoded(_rgb().convert("LA"), "PNG")
    alpha = bytes(range(0, 256, 32))
    yield "palette with transparency", "a.png", _encoded(_rgb().quantize(8), "PNG", transparency=alpha)
    yield "palette, one colour transparent", "a.gif", _encoded(_rgb().quantize(8), "GIF", transparency=3)
    yield "CMYK JPEG", "a.jpg", _encoded(_rgb().convert("CMYK"), "JPEG")
    yield "CMYK TIFF", "a.tif", _encoded(_rgb().convert("CMYK"), "TIFF")
    yield "16 bits", "a.png", _encoded(_grey([0, 1000, 65535], np.uint16), "PNG")
    yield "16 bits, big-endian", "a.tif", _encoded(Image.frombytes("I;16B", (2, 1), b"\x00\x00\x80\x00"), "TIFF")
    yield "16 bits, one grey transparent", "a.png", _png(2, 1, _chunk(b"tRNS", b"\0\0"), bits=16)
    yield "floats", "a.tif", _encoded(_grey([0, 0.25, 2], np.float32), "TIFF")
    yield "turned by EXIF", "a.jpg", _exif(6)
    yield "mirrored by EXIF", "a.jpg", _exif(2)
    yield "an impossible turn by EXIF", "a.jpg", _exif(99)
    yield "broken EXIF", "a.jpg", _broken_exif()
    yield "animated GIF", "a.gif", _frames("GIF")
    yield "animated PNG", "a.png", _frames("PNG")
    yield "animated WebP", "a.webp", _frames("WEBP")
    yield "TIFF of three pages", "a.tif", _frames("TIFF")
    yield "a phone's two pictures (MPO)", "a.jpg", _frames("MPO")
    yield "an icon", "a.ico", _encoded(Image.new("RGB", (16, 16)), "ICO")
    yield "a Targa picture", "a.tga", _encoded(_rgb(), "TGA")
    yield "a JPEG that is called .png", "a.png", _encoded(_rgb(), "JPEG")
    yield "a picture that is called .txt", "a.txt", _encoded(_rgb(), "PNG")
    yield "a name without ending", "picture", _encoded(_rgb(), "PNG")
    yield "a name of odd characters", "a 🧦\n;$(x)'\".png", _encoded(_rgb(), "PNG")
    yield "broken colour profile", "a.png", _encoded(_rgb(), "PNG", icc_profile=b"\xff" * 200)
    yield "half a megabyte of text", "a.png", _png(2, 2, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(500_000))))
    yield "pages in a circle", "a.tif", _tiff(*_tags(), after=8)
    yield "a strip that is said to have 4 GB", "a.tif", _tiff(*_tags(count=2**32 - 1))
    yield "a tag that is said to have 4 GB", "a.tif", _tiff(*_tags(), (700, 1, 2**32 - 1, 8))


def _too_large() -> Iterator[tuple[str, str, bytes]]:
    yield "one column too many", "a.png", _png(8193, 8192)
    yield "50000 x 50000 in 1 KB", "a.png", _png(50_000, 50_000)
    yield "two thousand million wide", "a.png", _png(2**31 - 1, 2**31 - 1)
    yield (
        "huge GIF",
        "a.gif",
        b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0)
        + bytes(6)
        + b","
        + (struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\x00;"),
    )
    yield "huge BMP", "a.bmp", _bmp(30_000, 30_000)
    yield "BMP of negative width", "a.bmp", _bmp(-4, 4)
    yield "huge PPM", "a.ppm", b"P6 999999999 999999999 255\n" + bytes(16)
    yield "huge JPEG 2000", "a.jp2", _jp2(2**31, 2**31)
    yield "huge TIFF", "a.tif", _tiff(*_tags(100_000, 100_000))


def _damaged() -> Iterator[tuple[str, str, bytes]]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000"):
        try:
            whole = _encoded(noise, format)
        except (KeyError, OSError):  # not every Pillow writes AVIF and JPEG 2000
            continue
        yield f"half of a {format}", "a", whole[: len(whole) // 2]
    bad = bytearray(_encoded(_rgb(), "PNG"))
    bad[20] ^= 1
    yield "wrong checksum", "a.png", bytes(bad)
    yield "pixels that are no zlib", "a.png", _encoded(_rgb(), "PNG")[:33] + _chunk(b"IDAT", b"\xff" * 99)
    yield "nothing after the header", "a.jpg", _encoded(_rgb(), "JPEG")[:20]
    yield "no width", "a.png", _png(0, 4)
    yield "no height", "a.bmp", _bmp(4, 0)
    yield "no size", "a.gif", b"GIF89a" + bytes(7) + b","
    yield "not numbers", "a.tif", _encoded(_grey([0, np.nan], np.float32), "TIFF")
    yield "infinity", "a.tif", _encoded(_grey([0, np.inf], np.float32), "TIFF")
    yield "32 bits", "a.tif", _encoded(_grey([0, 2**30], np.int32), "TIFF")
    yield "negative values", "a.tif", _encoded(_grey([-5, 1], np.int32), "TIFF")
    yield (
        "150 MB of text in 150 KB",
        "a.png",
        _png(2, 2, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(150_000_000), 9))),
    )
    yield (
        "80 texts of 1 MB",
        "a.png",
        _png(2, 2, *(_chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(1_040_000), 9)) for i in range(80))),
    )
    yield "a strip that lies nowhere", "a.tif", _tiff(*(t if t[0] != 273 else (273, 4, 1, 2**31) for t in _tags()))


def _no_pictures() -> Iterator[tuple[str, str, bytes]]:
    yield "nothing", "a.png", b""
    yield "text", "a.png", b"this is no picture"
    yield "SVG", "a.svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "PDF", "a.pdf", b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF\n"
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(executed) (w) file closefile\nshowpage\n%%EOF\n"
    yield "EPS", "a.eps", script
    yield "EPS that is called .png", "a.png", script
    yield "WMF", "a.wmf", b"\xd7\xcd\xc6\x9a" + bytes(60)
    yield "Photoshop", "a.psd", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(64)


def _file(name: str, data: bytes) -> Callable[[Path], Path]:
    def build(place: Path) -> Path:
        (place / name).write_bytes(data)
        return place / name

    return build


def _link(target: str | None = None, name: str = "link.png") -> Callable[[Path], Path]:
    def build(place: Path) -> Path:
        (place / "a.png").write_bytes(_encoded(_rgb(), "PNG"))
        (place / name).symlink_to(place / (target or name) if not str(target).startswith("/") else Path(str(target)))
        return place / name

    return build


def _folder(place: Path) -> Path:
    (place / "a.png").mkdir()
    return place / "a.png"


def _pipe(place: Path) -> Path:
    os.mkfifo(place / "a.png")
    return place / "a.png"


def _socket(place: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(place)  # the name of a socket has at most a hundred bytes
        try:
            one.bind("a.png")
        finally:
            os.chdir(here)
    return place / "a.png"


def entries() -> list[Entry]:
    """All of them, in groups of one answer."""
    found = [Entry(name, "picture", _file(file, data), READ) for name, file, data in _readable()]
    found.append(Entry("a link to a picture", "picture", _link("a.png"), READ))
    groups = ((_too_large, "no more are read: make it smaller"), (_damaged, "be read: "))
    for group, says in (*groups, (_no_pictures, "it is damaged, or in none of the formats AVIF, BMP, ")):
        found += [Entry(name, "picture", _file(file, data), says) for name, file, data in group()]
    found += [
        Entry("a folder", "picture", _folder, "is no picture but a folder"),
        Entry("a pipe", "picture", _pipe, "is no picture but a pipe, a device"),
        Entry("a socket", "picture", _socket, "is no picture but a pipe, a device"),
        Entry("a device without end", "picture", lambda place: Path("/dev/zero"), "is no picture but a pipe, a device"),
        Entry("a link to a device", "picture", _link("/dev/zero"), "is no picture but a pipe, a device"),
        Entry("a link to nothing", "picture", _link("none.png"), "there is no picture"),
        Entry("a link to itself", "picture", _link(), "is no picture but"),
        Entry("no file", "picture", lambda place: place / "none.png", "there is no picture"),
        Entry("a file as a folder", "picture", lambda place: _link("a.png")(place) / "b.png", "there is no picture"),
        Entry("a NUL in the name", "picture", lambda place: place / "a\0.png", "holds a NUL"),
        Entry("a name of 5000 letters", "picture", lambda place: place / ("a" * 5000), "File name too long"),
    ]
    return found
