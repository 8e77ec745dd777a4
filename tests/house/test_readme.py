"""The guides: what they point at is in the repository, and the options that they name exist."""

import functools
import os.path
import re
import subprocess
import sys

import pytest
from documents import GUIDES, OTHERS, ROOT, anchors, links, prose

from pixart.command import COMMANDS

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
PARTS = {
    "data": ("prepare", "prompts", "caption", "filter", "clean", "verify", "statistics"),
    "evaluate": (
        "list", "prompts", "draw", "score", "run", "report", "compare", "statistics", "detect",
        "trust", "check-weights", "accuracy",
    ),
    "preference": ("build", "serve", "page", "add", "judge", "fit"),
    "scaling": ("table", "fit", "study", "contrast"),
}  # fmt: skip
COMMAND_LINES = tuple(
    words
    for name in COMMANDS
    for words in [(name, one) for one in PARTS.get(name, ())] or [(name,)]
)
# Of torchrun, of bench.studies, of SGLang and vLLM-Omni.
OF_OTHERS = {
    "--nproc-per-node", "--out", "--pictures", "--backend", "--diffusion-load-format",
}  # fmt: skip


@needs_git
@pytest.mark.parametrize("document", GUIDES + OTHERS)
def test_links_lead_to_committed_files_and_to_headings_that_are_there(document: str) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = set(listed.stdout.split("\0"))
    places = files | {parent for file in files for parent in _above(file)}
    for link in links(document):
        path, _, anchor = link.partition("#")
        path = os.path.normpath(f"{os.path.dirname(document)}/{path}".lstrip("/"))
        path = path if link.partition("#")[0] else document
        assert path in places, f"{document} links to {link}"
        if anchor:
            assert anchor in anchors(path), f"{document} links to {link}"


def _above(file: str) -> set[str]:
    parts = file.split("/")
    return {"/".join(parts[:count]) for count in range(1, len(parts))}


@functools.cache
def _known_options() -> str:
    """What --help of all commands prints."""
    texts = []
    for names in COMMAND_LINES:
        done = subprocess.run(
            [sys.executable, "-m", "pixart", *names, "--help"],
            capture_output=True, text=True, cwd=ROOT, check=True,
        )  # fmt: skip
        texts.append(done.stdout)
    return "\n".join(texts)


@pytest.mark.parametrize(
    "document",
    [
        "pixart/README.md",
        "pixart/generation/README.md",
        "pixart/training/README.md",
        "pixart/evaluation/README.md",
        "pixart/serving/README.md",
    ],
)
def test_options_that_a_guide_names_exist(document: str) -> None:
    code = " ".join(re.findall(r"`([^`]+)`", prose(document)))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", code)) - OF_OTHERS
    assert len(named) > 10
    missing = {name for name in named if not re.search(rf"{re.escape(name)}\b", _known_options())}
    assert not missing


@needs_git
def test_only_the_picture_of_make_demo_in_the_root_is_ignored() -> None:
    for path, ignored in (("demo.png", True), ("pixart/assets/shapes/demo.png", False)):
        check = ["git", "check-ignore", "--no-index", "--quiet", path]
        assert (subprocess.run(check, cwd=ROOT).returncode == 0) == ignored, path
