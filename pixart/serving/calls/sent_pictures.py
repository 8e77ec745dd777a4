"""Pictures that clients send, as text in JSON or as files in forms, opened within bounds.

Only what is sent is opened: a path or a URL is a text that is no picture. Formats are those that browsers
and programs write, told by their first bytes, so that no decoder of another one sees them.
"""

import base64
import binascii
import re
from typing import TYPE_CHECKING

from pixart.pictures import PictureError, open_picture, opened_head
from pixart.serving.limits import Limits
from pixart.serving.refusal import Refusal

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_SIDE = 16_384  # pixels
# By Pillow's name; MPO is how phones write a JPEG that has more than its picture.
FORMATS = {"PNG": "PNG", "JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WebP"}
_MAGIC = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)
_DATA, _BASE64 = "data:", ";base64"  # how the head of a data URL begins and ends
_LONGEST_HEAD = 200
# What of a file the pipeline looks at: colours, what is transparent, and which way is up.
_KEPT = ("icc_profile", "transparency", "exif", "xmp", "XML:com.adobe.xmp")
_ITSELF = "must be the picture itself, as base64 or a data URL"


def picture_of_text(text: str, field: str, limits: Limits) -> "Image":
    """The picture in base64 or in a data URL, as it is stored: decoded whole, not turned. Refusal (400, or
    413 for one that is too large) that names the field."""
    return picture_of_bytes(bytes_of_text(text, field), field, limits)


def bytes_of_text(text: str, field: str) -> bytes:
    """The file in base64 or in a data URL. Refusal (400) for a text that is none, as paths and URLs are."""
    text = text.strip()
    head, comma, rest = text[:_LONGEST_HEAD].lower().partition(",")
    is_url = comma and head.startswith(_DATA) and head.endswith(_BASE64)
    # Some programs wrap lines, and some leave the end out.
    plain = "".join((text[len(head) + 1 :] if is_url else text).split()).rstrip("=")
    try:
        content = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if not _MAGIC.match(content):
        raise _refusal(field, f"{_ITSELF}, of a {_named()} file; paths and URLs are not followed")
    return content


def picture_of_bytes(content: bytes, field: str, limits: Limits) -> "Image":
    """The picture of a file's bytes, as it is stored: decoded whole, not turned. Refusal (400, or 413 for
    one that is too large) that names the field. Its pixels are counted before they are decoded."""
    if not _MAGIC.match(content):
        raise _refusal(field, f"must be a {_named()} file")
    try:
        with opened_head(content, field) as head:
            format, (width, height) = head.format, head.size
        if format not in FORMATS:
            raise _refusal(field, f"must be a {_named()} file")
        _check_size(width, height, field, limits)
        image = open_picture(content, field)
    except PictureError as error:
        raise _refusal(field, f"cannot be read ({error.reason})") from error
    frames = 1 if format == "MPO" else getattr(image, "n_frames", 1)
    if frames != 1:
        raise _refusal(field, f"must be one picture, it has {frames} frames")
    _drop_texts(image)
    return image


def _check_size(width: int, height: int, field: str, limits: Limits) -> None:
    if width * height > limits.picture_pixels or max(width, height) > MOST_SIDE:
        raise Refusal(
            413,
            f"{field} must have {limits.picture_pixels:,} pixels and {MOST_SIDE:,} a side at most, got "
            f"{width}x{height}",
            code="over_limit",
            field=field,
        )


def _drop_texts(image: "Image") -> None:
    """A picture waits in the queue: megabytes of comments need not."""
    for name in [name for name in image.info if name not in _KEPT]:
        del image.info[name]
    getattr(image, "text", {}).clear()  # of a PNG, beside its info


def _named() -> str:
    *others, last = dict.fromkeys(FORMATS.values())
    return f"{', '.join(others)} or {last}"


def _refusal(field: str, reason: str) -> Refusal:
    return Refusal(400, f"{field} {reason}", code="bad_picture", field=field)
