"""The pictures of a page: which, and each as a small JPEG inside of the page, linked to its file."""

import io
import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import quote

from pixart.evaluation.metric import Score
from pixart.evaluation.report import numbers
from pixart.evaluation.report.markup import Html, joined, quoted, shortened, tag
from pixart.evaluation.store.entries import Entry
from pixart.pictures import PictureError, open_rgb

SHOWN = 12
THUMBNAIL, QUALITY = 160, 80  # pixels of the longer side; of JPEG
WORDS = 110  # of a prompt below a picture


def choose(scores: Mapping[str, Score], higher_is_better: bool) -> dict[str, list[str]]:
    """Keys of the best, the worst, and those in the middle of the order; of equal scores by key."""
    sign = -1.0 if higher_is_better else 1.0
    best = sorted(scores, key=lambda key: (sign * scores[key].value, key))
    worst = sorted(scores, key=lambda key: (-sign * scores[key].value, key))
    middle = max(0, (len(best) - SHOWN) // 2)
    return {
        "Best": best[:SHOWN],
        "Median": best[middle : middle + SHOWN],
        "Worst": worst[:SHOWN],
    }


def tied(scores: Mapping[str, Score], keys: Sequence[str]) -> int:
    """How many pictures have the score of the last one that is shown; 0 if all of those are shown."""
    if not keys:
        return 0
    last = scores[keys[-1]].value
    equal = [key for key, score in scores.items() if score.value == last]
    return len(equal) if set(equal) - set(keys) else 0


def card(entry: Entry, score: Score, unit: str, page: Path) -> Html:
    """A picture with its score and prompt. page: the folder that links start from."""
    return tag(
        "li",
        shot(entry, page),
        tag("b", numbers.plain(score.value) + numbers.spaced(unit)),
        quoted(entry.prompt.prompt, WORDS),
    )


def shot(entry: Entry, page: Path) -> Html:
    """The small picture, linked to the file; words where there is none."""
    words = shortened(entry.prompt.prompt, 250)
    small = thumbnail(entry.path)
    if small is None:
        return tag(
            "span", tag("small", f"{entry.key} is not in this folder any more"), class_="shot"
        )
    image = tag("img", src=small, alt=f"drawn for: {words}", decoding="async",
                width=THUMBNAIL, height=THUMBNAIL)  # fmt: skip
    return tag("a", image, href=link(entry.path, page), class_="shot", title=entry.key)


def gallery(entries: Sequence[tuple[Entry, Score]], unit: str, page: Path) -> Html:
    cards = joined(card(entry, score, unit, page) for entry, score in entries)
    return tag("ul", cards, class_="gallery", role="list")


def link(path: Path, page: Path) -> str:
    """From the page to a file, also where the folders are named by a stranger."""
    return quote(Path(os.path.relpath(path, page)).as_posix())


@cache
def thumbnail(path: Path) -> str | None:
    """A data: address of a JPEG of at most THUMBNAIL pixels; None for a picture that cannot be opened: the
    report of a damaged folder says so, and is written."""
    try:
        image = open_rgb(path, str(path))
    except (PictureError, OSError):
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{b64encode(content.getvalue()).decode()}"
