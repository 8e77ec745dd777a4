"""`python -m bench.report`: BENCHMARKS.md, a page for each result and bench/plots/, from
bench/results/*.json and nothing else.

No figure is typed: --check, and a test, make all of it again and compare; a picture carries the hash
of what it shows. What has no result is called not measured.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.report")

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.measure import results
from bench.reporting import overview, pages, plots
from bench.reporting.plots import Named
from pixart.files import write_bytes

ROOT = Path(__file__).parent.parent


def texts(root: Path, found: Sequence[Named]) -> dict[Path, str]:
    """What every Markdown file that is made must say."""
    made = {root / "BENCHMARKS.md": overview.render(found)}
    folder = root / "bench" / "results"
    return made | {folder / f"{name}.md": pages.page(one, f"{name}.json") for name, one in found}


def stale(root: Path) -> list[Path]:
    """The files that are not what the results say, or should not be there."""
    found = results.read_all(root / "bench" / "results")
    made = texts(root, found)
    wrong = [
        path for path, text in made.items() if not path.exists() or path.read_text("utf-8") != text
    ]
    wrong += [path for path in (root / "bench" / "results").glob("*.md") if path not in made]
    return wrong + plots.stale(found, root / "bench" / "plots")


def write(root: Path) -> None:
    """Every file anew; those that no result stands for are removed."""
    found = results.read_all(root / "bench" / "results")
    made = texts(root, found)
    for path in (root / "bench" / "results").glob("*.md"):
        if path not in made:
            path.unlink()
    for path, text in made.items():
        write_bytes(path, text.encode())
    plots.draw(found, root / "bench" / "plots")


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether all is current")
    if not parser.parse_args(arguments).check:
        write(root)
        return 0
    wrong = stale(root)
    for path in wrong:
        name = path.relative_to(root).as_posix()
        print(f"{name} is not what bench/results says; run python -m bench.report")
    return 1 if wrong else 0
