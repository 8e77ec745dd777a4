"""README: what it points at is in the repository."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LINKS = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("link", sorted(set(LINKS)))
def test_a_link_of_the_readme_leads_to_a_file_that_is_committed(link: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--", link], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert listed.stdout.split() == [link]


def test_only_the_picture_of_make_demo_in_the_root_is_ignored() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    for path, ignored in (("demo.png", True), ("pixart/assets/shapes/demo.png", False)):
        check = ["git", "check-ignore", "--no-index", "--quiet", path]
        assert (subprocess.run(check, cwd=ROOT).returncode == 0) == ignored, path
