"""Pictures of others: which files are opened, how, and their colours in sRGB.

Pillow is asked for the formats below and no other. Left to itself it tries all it has, whatever a file
is called, and for some it starts other programs. What is opened is decoded whole, and whatever a
decoder raises over damaged bytes is one ValueError that names the picture.
"""

import io
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageCms import ImageCmsTransform
    from PIL.ImageFile import ImageFile

Source = Path | bytes | IO[bytes]

# Pillow's names of the formats that are read, each with the suffixes of its files.
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
}
HEIF = {"HEIF": (".heic", ".heif", ".hif")}  # where pillow-heif is installed
# Pictures to people and to us none that can be read: to be named, not passed over.
UNREAD_SUFFIXES = {
    ".heic", ".heif", ".hif", ".heics", ".heifs", ".avifs", ".avci", ".avcs", ".jxl", ".jp2",
    ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".jpm", ".jxr", ".wdp", ".hdp", ".jng", ".mng",
    ".dib", ".ico", ".cur", ".icns", ".psd", ".psb", ".xcf", ".kra", ".clip", ".tga", ".dds",
    ".ktx", ".ktx2", ".exr", ".hdr", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".pfm", ".pcx",
    ".dcx", ".sgi", ".rgb", ".ras", ".sun", ".xbm", ".xpm", ".qoi", ".bpg", ".flif", ".fits",
    ".fit", ".svg", ".svgz", ".eps", ".ps", ".ai", ".wmf", ".emf", ".dng", ".raw", ".cr2",
    ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef",
    ".srw", ".x3f", ".3fr", ".erf", ".kdc", ".mef", ".mos", ".mrw", ".iiq", ".rwl", ".gpr",
}  # fmt: skip
MAX_ENLARGED = 1024  # pixels along a side
MAX_BYTES = 2**30  # of a file; pixels are bounded by Pillow
_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 lie on their side
_TIFF_WIDTH, _TIFF_HEIGHT = 0x0100, 0x0101
# Colours that differ by so much after a conversion are the rounding of two ways to write one profile.
_SAME_LEVELS = 1
_SPACES = {
    "RGB": "RGB",
    "GRAY": "L",
    "CMYK": "CMYK",
    "Lab": "LAB",
}  # of profiles, to Pillow's modes


class PictureError(ValueError):
    """A picture that cannot be opened: one line with its name. reason: why, without it."""

    def __init__(self, name: str, reason: str, is_picture: bool = True) -> None:
        what = f"cannot be read ({reason})" if is_picture else f"is not a picture, {reason}"
        super().__init__(f"{name}: {what}")
        self.reason = reason


@dataclass(frozen=True)
class Head:
    """Pixels of the upright picture, of its ICC profile whether there is one and what is wrong, and the
    format, one of FORMATS and HEIF."""

    height: int
    width: int
    has_profile: bool
    profile_fault: str
    format: str


@cache
def readable_suffixes() -> frozenset[str]:
    """The suffixes, in small letters, of files that are read."""
    return frozenset(suffix for suffixes in _formats().values() for suffix in suffixes)


@cache
def picture_suffixes() -> frozenset[str]:
    """The suffixes of every picture, read or not."""
    return readable_suffixes() | UNREAD_SUFFIXES


def unread(suffix: str) -> str:
    """Why a file of this suffix cannot be read though it is a picture; "" for any other."""
    suffix = suffix.lower()
    if suffix in readable_suffixes() or suffix not in picture_suffixes():
        return ""
    way_out = "pip install pillow-heif or convert it" if suffix in HEIF["HEIF"] else "convert it"
    return f"pictures in {suffix} are not read; {way_out} to one of {', '.join(_formats())}"


def open_picture(source: Source, name: str) -> "Image":
    """The whole picture as it is stored: decoded, not turned, in its own mode. Of several, the first.

    source: a path, a file's bytes, or a binary file that can be sought in. name: for messages.
    Raises PictureError, also for a path that is no regular file.
    """
    with opened_head(source, name) as image:
        # Opening reads the head alone: damage further on shows here.
        image.load()
        image.getexif()  # kept in the image; of some formats it lies in the file
        return image


def open_rgb(source: Source, name: str) -> "Image":
    """The whole picture as RGB of 8 bits: upright, in sRGB, transparency over white. Raises PictureError."""
    with decoding(name):
        return over(to_srgb(upright(open_picture(source, name))), "white")


def upright(image: "Image") -> "Image":
    """An opened picture, turned as its EXIF says: a camera stores what its sensor saw and notes how to
    turn it. `head_of` turns the same way."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def over(image: "Image", colour: str) -> "Image":
    """A picture of `to_srgb` as RGB: what is transparent shows the colour."""
    from PIL import Image

    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def enlarged(image: "Image", factor: int) -> "Image":
    """A preview of one pixel for each latent, by as much as a finished picture is larger, or by the largest
    whole factor that stays within MAX_ENLARGED."""
    factor = max(1, min(factor, MAX_ENLARGED // max(image.size)))
    return image.resize((image.width * factor, image.height * factor))


def read_content(source: Source, name: str) -> bytes:
    """The bytes of the file. Raises PictureError where there are none, as for a folder or a pipe."""
    with decoding(name):
        return _content(source)


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Whatever Pillow raises within the block over a picture is a PictureError."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        reason = f"no picture format that is known: {', '.join(_formats())}"
        raise PictureError(name, reason, is_picture=False) from error
    except _damage() as error:
        raise PictureError(name, _reason(error)) from error


def head_of(source: Source, name: str) -> Head:
    """What the head of the file says; of a PNG, whose EXIF may come last, all is read. Raises PictureError."""
    with opened_head(source, name) as image:
        width, height = image.size
        # Of a TIFF, newer Pillows have turned the size already.
        if tags := getattr(image, "tag_v2", None):
            width, height = tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT]
        lies = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return Head(
            *((width, height) if lies else (height, width)),
            has_profile=bool(image.info.get("icc_profile")),
            profile_fault=profile_fault(image),
            format=image.format or "",
        )


def to_srgb(image: "Image") -> "Image":
    """An opened picture as RGB, or as RGBA if anything in it is transparent, 8 bits, in sRGB.

    Converted perceptually by the embedded ICC profile, whatever its space: RGB, grey, CMYK or Lab.
    Without one, or with one of which `profile_fault` tells, its numbers are taken as sRGB. ValueError
    for pixels of floating point, which have no known range.
    """
    if not image.info.get("icc_profile") or profile_fault(image):
        image = _of_8_bits(image)
        # Transparent pixels have a colour too, often black, which dropping alpha would show.
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    from PIL import Image

    mode, transform = _transform(image.info["icc_profile"])
    image = _of_8_bits(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    # By way of RGBA, as Pillow has no way from some modes with alpha to those without.
    image = image if alpha is None else image.convert("RGBA")
    image = image.convert(mode)
    if transform is not None:
        image = transform.apply(image)
    return image if alpha is None else Image.merge("RGBA", (*image.split(), alpha))


def profile_fault(image: "Image") -> str:
    """Why the ICC profile of an opened picture cannot be used, "" if it can, or if there is none."""
    profile = image.info.get("icc_profile", b"")
    if profile == b"":
        return ""
    try:
        if profile is None:  # what Pillow makes of one that is not whole
            raise ValueError("it is damaged")
        mode, _ = _transform(profile)
        if mode not in _profile_modes(image.mode):
            raise ValueError(f"it is made for {mode}, the picture is {image.mode}")
    except _damage() as error:
        return f"colours are taken as sRGB, the embedded profile cannot be used: {_reason(error)}"
    return ""


def _profile_modes(mode: str) -> tuple[str, ...]:
    """The modes that a profile can be made for, to be about a picture of this mode."""
    if mode in ("CMYK", "LAB"):
        return (mode,)
    # Grey files with an RGB profile are common: their levels are those of equal red, green and blue.
    return ("L", "RGB") if mode in ("1", "L", "LA", "La") or mode.startswith("I") else ("RGB",)


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str, "ImageCmsTransform | None"]:
    """The mode that a profile is made for, and the way from there to sRGB, None for sRGB itself."""
    from PIL import Image, ImageChops, ImageCms

    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    if space not in _SPACES:
        raise ValueError(f"its space must be one of {', '.join(_SPACES)}, got {space!r}")
    mode = _SPACES[space]
    transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB":
        # Most profiles are some way to write sRGB. Such a picture stays as it is, to the bit.
        levels = range(0, 256, 15)
        colours = bytes(level for colour in product(levels, repeat=3) for level in colour)
        probe = Image.frombytes("RGB", (len(levels), len(levels) ** 2), colours)
        moved = ImageChops.difference(probe, transform.apply(probe))
        if max(moved.tobytes()) <= _SAME_LEVELS:
            return mode, None
    return mode, transform


@contextmanager
def opened_head(source: Source, name: str) -> Iterator["Image"]:
    """With the head read, and no pixel. Raises PictureError, for what is raised within the block too."""
    with decoding(name), _identified(_content(source)) as image:
        if 0 in image.size:
            raise ValueError("it has no pixels")
        yield image


def _content(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    if not isinstance(source, Path):
        source.seek(0)
        return source.read()
    status = source.stat()
    # Of a pipe or a device there might be no end, and no beginning either.
    if not stat.S_ISREG(status.st_mode):
        raise OSError("a folder, a pipe or a device, not a file")
    if status.st_size > MAX_BYTES:
        raise OSError(f"{status.st_size:,} bytes, at most are {MAX_BYTES:,}")
    return source.read_bytes()


def _identified(content: bytes) -> "ImageFile":
    from PIL import Image

    formats = list(_formats())
    try:
        return Image.open(io.BytesIO(content), formats=formats)
    except _damage():
        bare = _without_profile(content)
        if bare is None:
            raise
        image = Image.open(io.BytesIO(bare), formats=formats)
        image.info["icc_profile"] = None
        return image


def _without_profile(content: bytes) -> bytes | None:
    """A PNG without its profile, over which Pillow may fail: the picture can be shown all the same.
    None for what is no PNG with one."""
    place = len(_PNG)
    while content.startswith(_PNG) and place + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        if kind == b"iCCP":
            return content[:place] + content[place + 12 + length :]
        place += 12 + length  # length, kind and checksum
    return None


@cache
def _formats() -> dict[str, tuple[str, ...]]:
    from PIL import Image

    Image.init()
    formats = dict(FORMATS)
    if find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
        formats |= HEIF
    # A Pillow may be built without AVIF, and Pillow fails over a name that it does not know.
    return {name: suffixes for name, suffixes in formats.items() if name in Image.OPEN}


@cache
def _damage() -> tuple[type[Exception], ...]:
    """What Pillow and the libraries below it raise over damaged bytes: there is no common kind."""
    from PIL import Image, ImageCms

    return (OSError, SyntaxError, ValueError, LookupError, EOFError, TypeError, AttributeError,
            NameError, AssertionError, ArithmeticError, BufferError, MemoryError, RuntimeError,
            ImportError, Warning, struct.error, zlib.error, Image.DecompressionBombError,
            ImageCms.PyCMSError)  # fmt: skip


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def _of_8_bits(image: "Image") -> "Image":
    """16 and 32 bit grey to 8 bits; Pillow's own conversion clips everything above 255 to white. Grey with
    alpha multiplied in becomes plain: from there Pillow has a way to other modes."""
    if image.mode == "La":
        return image.convert("LA")
    if not image.mode.startswith(("I", "F")):
        return image
    import numpy as np
    from PIL import Image

    levels = np.asarray(image)
    if levels.dtype.kind == "f":
        raise ValueError("pixels of floating point have no known range")
    return Image.fromarray((levels.clip(0, 65535) // 257).astype(np.uint8))
