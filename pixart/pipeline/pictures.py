"""Pictures as files: written whole or not at all, each with the metadata that draws it again."""

import errno
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart import files
from pixart.pictures import open_picture, opened_head
from pixart.pipeline.metadata import CHOICES, Metadata, NewerVersionError
from pixart.pipeline.request import SETTINGS, Request

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "pixart"  # of the PNG text chunk; JPEG and WebP carry the same text as an EXIF description
GALLERY_KEY = "parameters"  # in JPEG and WebP the EXIF comment of whoever took the picture
EXIF_LIMIT = 60_000  # bytes; JPEG holds 64 KiB of EXIF, WebP writers no more
QUALITY = 95  # of JPEG and WebP
SUFFIXES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
_EXIF_DESCRIPTION, _EXIF_SUB_DIRECTORY, _EXIF_COMMENT = 0x010E, 0x8769, 0x9286
_UNICODE = b"UNICODE\0"  # before such a comment


def encode_picture(
    image: "Image", metadata: Metadata, format: str, quality: int | None = None
) -> bytes:
    """The content of a file of the picture and of what drew it: JSON, and the line that gallery tools read.

    format: png, jpg or webp. quality: of JPEG and WebP, 1 to 100, None for QUALITY.
    """
    from PIL import Image as PILImage
    from PIL.PngImagePlugin import PngInfo

    content = io.BytesIO()
    if format == "png":
        info = PngInfo()
        info.add_itxt(KEY, metadata.to_text())
        info.add_text(GALLERY_KEY, metadata.to_parameters())
        image.save(content, "PNG", pnginfo=info)
    else:
        exif = PILImage.Exif()
        exif[_EXIF_DESCRIPTION] = metadata.to_text()
        exif[_EXIF_SUB_DIRECTORY] = {_EXIF_COMMENT: _comment(metadata)}
        name = {"jpg": "JPEG", "webp": "WEBP"}[format]
        image.save(content, name, quality=quality or QUALITY, exif=exif)
    return content.getvalue()


def write_picture(
    image: "Image",
    path: Path,
    metadata: Metadata,
    *,
    quality: int | None = None,
    replace: bool = True,
) -> None:
    """Write what `encode_picture` makes of it, in the format that the suffix says.

    replace: without it, FileExistsError is raised where there is a file.
    """
    content = encode_picture(image, metadata, SUFFIXES[path.suffix.lower()], quality)
    try:
        with files.written_aside(path, replace=replace) as aside:
            aside.write_bytes(content)
    except FileExistsError:
        raise
    except OSError as error:
        raise write_error(path, error) from error


def check_room(path: Path, metadata: Metadata) -> None:
    """Raise ValueError if a prompt is too long for what a file of that kind carries."""
    size = len(metadata.to_text()) + len(_comment(metadata))
    if path.suffix.lower() != ".png" and size > EXIF_LIMIT:
        raise ValueError(
            f"prompt must fit into {EXIF_LIMIT} bytes of a {path.suffix} file, got {size}; "
            "use --format png"
        )


def _comment(metadata: Metadata) -> bytes:
    return _UNICODE + metadata.to_parameters().encode("utf-16-be")


def write_error(path: Path, error: OSError) -> Exception:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return RuntimeError(f"{path}: cannot be written ({reason}); finished pictures are kept")
    return ValueError(f"{path}: cannot be written ({reason}); choose another --output")


def check_writable(paths: list[Path]) -> None:
    """Raise ValueError when pictures could not be put where they are to go. Leaves no folder."""
    for path in paths:
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        except OSError as error:
            raise write_error(path, error) from error
    for folder in dict.fromkeys(path.parent for path in paths):
        try:
            files.check_writable(folder / "picture")
        except OSError as error:
            raise write_error(folder, error) from error


@dataclass(frozen=True)
class Picture:
    """What a picture file of ours carries, and its width and height in pixels."""

    metadata: Metadata
    size: tuple[int, int]


def read_picture(path: Path) -> Picture:
    """A picture of ours, of any version so far. ValueError says why it is none."""
    image = open_picture(path, str(path))  # all of it: half a picture is none
    text = image.info.get(KEY) or image.getexif().get(_EXIF_DESCRIPTION)
    try:
        return Picture(Metadata.from_text(text if isinstance(text, str) else ""), image.size)
    except NewerVersionError as error:
        raise ValueError(f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(
            f"{path}: carries no request of pixart.generate; it was not drawn by it"
        ) from error


def read_metadata(path: Path) -> Metadata:
    """What a picture of ours carries, of any version so far. ValueError says why there is none."""
    return read_picture(path).metadata


def find_drawn(
    path: Path, asked: Request, model: Mapping[str, Any], inputs: Mapping[str, str] | None = None
) -> Picture | None:
    """The picture, if its file is there and made by this very request. inputs: what the pictures are that
    the request names, as `Drawn.inputs` has them: of others it was another request."""
    try:
        found = read_picture(path)
    except ValueError:
        return None
    if dict(found.metadata.asked_model) != dict(model):
        return None
    if dict(found.metadata.inputs) != dict(inputs or {}):
        return None
    for name in SETTINGS:
        same = [getattr(found.metadata.asked, name)]
        if name in CHOICES:  # by what was made of it too: a tile of True becomes one of 512
            same += [getattr(found.metadata.request, name), None]
        if getattr(asked, name) not in same:
            return None
    return found


def read_texts(content: bytes, name: str) -> tuple[str, str]:
    """Our JSON and the line of gallery tools, of a file of any program, "" for what is not there. No pixel
    is decoded. name: for messages. Raises PictureError."""
    with opened_head(content, name) as image:
        texts = [image.info.get(key) for key in (KEY, GALLERY_KEY)]
        if image.format != "PNG":  # whose EXIF may come last: Pillow would decode all of it
            exif = image.getexif()
            comment = exif.get_ifd(_EXIF_SUB_DIRECTORY).get(_EXIF_COMMENT)
            texts = [exif.get(_EXIF_DESCRIPTION), _text_of(comment)]
    ours, parameters = (text if isinstance(text, str) else "" for text in texts)
    return ours, parameters


def _text_of(comment: object) -> str:
    """Of an EXIF comment, in UTF-16 of either order, which nothing in it tells."""
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return ""
    text = comment.removeprefix(_UNICODE)
    either = (text.decode(order, "replace") for order in ("utf-16-be", "utf-16-le"))
    return max(either, key=lambda read: sum(one.isascii() for one in read))
