"""The Markdown files that guide a reader: their examples, links and headings."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
GUIDES = (
    "README.md",
    "pixart/README.md",
    "pixart/comfyui/README.md",
    "pixart/generation/README.md",
    "pixart/training/README.md",
    "pixart/evaluation/README.md",
    "pixart/evaluation/preference/README.md",
    "pixart/scalability/README.md",
    "pixart/serving/README.md",
    "bench/README.md",
    "kernels/README.md",
    ".github/CONTRIBUTING.md",
)
OTHERS = (
    "CHANGELOG.md",
    "BENCHMARKS.md",
    "pixart/assets/shapes/README.md",
    "pixart/assets/shapes-clip/README.md",
    "pixart/assets/shapes-control/README.md",
)

_FENCE = re.compile(r" *```(\S*) *$")
_LINK = re.compile(r"\]\((?!https?:)([^)]+)\)")


@dataclass(frozen=True)
class Example:
    """A fenced block. line: of the fence, from 1; language: what stands behind its backticks."""

    document: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that the block is to be written to, which its first line names as a comment."""
        named = re.match(r"# (\S+/\S+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def examples(document: str) -> Iterator[Example]:
    start: tuple[int, str] | None = None
    lines = read(document).splitlines()
    for number, line in enumerate(lines, start=1):
        fence = _FENCE.match(line)
        if start is None and fence:
            start = number, fence[1]
        elif start is not None and line.strip() == "```":
            text = "\n".join(lines[start[0] : number - 1]) + "\n"
            yield Example(document, *start, text)
            start = None
    assert start is None, f"{document}:{start}: the block is not closed"


def prose(document: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", read(document), flags=re.DOTALL | re.MULTILINE)


def links(document: str) -> list[str]:
    """Relative links, of pictures too, as they are written."""
    return sorted(set(_LINK.findall(prose(document))))


def anchors(document: str) -> set[str]:
    """What GitHub makes of the headings: lower case, words joined by hyphens, no punctuation."""
    titles = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
