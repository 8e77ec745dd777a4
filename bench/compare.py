"""`python -m bench.compare BASE`: is this working tree faster or slower than the revision BASE?

Both run their own smoke benches, each in processes of its own, in turn: BASE, this tree, this tree,
BASE, and so on, so that whatever else the machine does meets both. A ratio is this tree's median over
BASE's, of one round; what is printed is the median of the rounds' ratios with the least and the largest.

A bench is slower if it is in every round, by more than the noise: 5 %, or what a peer of the same
operator, whose code is not ours, seems to have changed by in every round, if that is more. Exit codes:
0 done, 1 a bench of ours is slower, 2 nothing to compare.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.compare")

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.measure.machine import ROOT
from pixart.files import read_json

Medians = dict[str, float]  # seconds by bench
BASE, HERE = "base", "here"
NOISE = 0.05  # a revision compared with itself came out within 0.03 (2 rounds, 2 Xeon cores, 15 benches)
NOTHING_COLLECTED = 5  # pytest's exit code


class CompareError(Exception):
    """What keeps two revisions from being compared, in one line."""


class Ratio(NamedTuple):
    """Seconds at BASE and here, over all rounds; here over BASE, round by round: below 1 is faster."""

    bench: str
    base: float
    here: float
    ratio: float
    least: float
    most: float

    @property
    def is_ours(self) -> bool:
        """By its variant; in a pipeline everything is ours but the empty Python. Eager PyTorch runs our
        references, and diffusers' model accelerated our operators."""
        is_stage = "bench_pipeline" in self.bench and not self.bench.endswith("-python]")
        return is_stage or any(word in self.bench for word in ("-ours", "-eager", "accelerated"))

    @property
    def measures(self) -> str:
        """What else is of the same operator, or step: "bench_operators" and "modulate"."""
        return self.bench.split("[")[0] + self.bench.partition("[")[2].split("/")[0]

    @property
    def change(self) -> float:
        """What all rounds agree on: 0.1 for at least 10 % more in each, 0 if they do not agree."""
        return max(self.least - 1, 0) or min(self.most - 1, 0)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=about)
    parser.add_argument("base", help="a revision: a branch, a tag, a commit")
    parser.add_argument("--rounds", type=int, default=3, help="of both revisions (3)")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="which benches, as in pytest")
    options = parser.parse_args(arguments)
    try:
        rounds = compare(root, options.base, options.rounds, options.k)
    except CompareError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    found = ratios(rounds[BASE], rounds[HERE])
    print("\n".join([*render(found), *unmatched(rounds[BASE], rounds[HERE])]))
    return 2 if not found else 1 if slower(found) else 0


def compare(root: Path, base: str, rounds: int, expression: str) -> dict[str, list[Medians]]:
    """Medians of every round, by BASE and HERE. Raises CompareError."""
    if rounds < 1:
        raise CompareError(f"--rounds must be at least 1, got {rounds}")
    found: dict[str, list[Medians]] = {BASE: [], HERE: []}
    with worktree(root, base) as tree:
        trees = {BASE: tree, HERE: root}
        order = [BASE, HERE]
        for number in range(rounds):
            for name in order:
                print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
                found[name].append(run(trees[name], expression))
            order.reverse()
    return found


@contextmanager
def worktree(root: Path, revision: str) -> Iterator[Path]:
    """A checkout of the revision, gone afterwards."""
    named = f"{revision}^{{commit}}"
    done = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", named)
    if done.returncode:
        raise CompareError(f"BASE must be a revision of this repository, got {revision!r}")
    try:
        with tempfile.TemporaryDirectory(prefix="bench-compare-") as folder:
            tree = Path(folder) / "base"
            made = _git(root, "worktree", "add", "--detach", str(tree), done.stdout.strip())
            if made.returncode:
                raise CompareError(f"git could not check {revision} out: {made.stderr.strip()}")
            yield tree
    finally:
        _git(root, "worktree", "prune")


def run(tree: Path, expression: str) -> Medians:
    """The smoke benches of one tree in a process of their own; empty where none has such a name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benches.json"
        command = [sys.executable, "-m", "pytest", "bench", "-m", "smoke", "--benchmark-only", "-q"]
        command += ["--benchmark-json", str(path), "-p", "no:cacheprovider", "-k", expression]
        sources = os.pathsep.join([str(tree), str(tree / "kernels")])
        environment = {**os.environ, "PYTHONPATH": sources}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode == NOTHING_COLLECTED:
            return {}
        if done.returncode:
            raise CompareError(f"the benches failed in {tree}:\n{done.stdout[-3000:]}{done.stderr}")
        benches = read_json(path)["benchmarks"]
    return {bench["fullname"]: bench["stats"]["median"] for bench in benches}


def ratios(base: Sequence[Medians], here: Sequence[Medians]) -> list[Ratio]:
    """Of the benches that every round of both has, the slowest-grown first."""
    found = []
    for bench in set.intersection(*(set(one) for one in (*base, *here))):
        before, after = ([one[bench] for one in side] for side in (base, here))
        each = [new / old for old, new in zip(before, after, strict=True)]
        spread = median(each), min(each), max(each)
        found.append(Ratio(bench, median(before), median(after), *spread))
    return sorted(found, key=lambda one: (-one.ratio, one.bench))


def verdict(found: Sequence[Ratio], one: Ratio) -> str:
    """Whether "slower" or "faster", empty where the change is within the noise of this comparison."""
    peers = (peer for peer in found if not peer.is_ours and peer.measures == one.measures)
    if abs(one.change) <= max([NOISE, *(abs(peer.change) for peer in peers)]):
        return ""
    return "slower" if one.change > 0 else "faster"


def slower(found: Sequence[Ratio]) -> list[str]:
    """The benches of ours that are."""
    return [one.bench for one in found if one.is_ours and verdict(found, one) == "slower"]


def render(found: Sequence[Ratio]) -> Iterator[str]:
    """The lines of the table, and its summary."""
    yield "this tree over BASE: below 1.00 is faster; least and largest of the rounds"
    yield f"{'BASE ms':>10} {'here ms':>10} {'ratio':>6} {'spread':>13}          bench"
    for one in found:
        spread = f"{one.least:.2f} to {one.most:.2f}"
        yield (
            f"{1e3 * one.base:10.4g} {1e3 * one.here:10.4g} {one.ratio:6.2f} {spread:>13}"
            f"  {verdict(found, one):6}  {one.bench}"
        )
    for name, is_ours in (("ours", True), ("peers", False)):
        if side := [one.ratio for one in found if one.is_ours == is_ours]:
            yield f"{median(side):28.2f}{'':23}median of {len(side)} benches of {name}"
    yield f"{len(slower(found))} of ours slower beyond the noise"


def unmatched(base: Sequence[Medians], here: Sequence[Medians]) -> Iterator[str]:
    """What only one of the two has."""
    every = set[str]().union(*base, *here)
    for name, side in (("BASE", base), ("this tree", here)):
        if missing := sorted(one for one in every if not all(one in medians for medians in side)):
            yield f"not in {name}: {', '.join(missing)}"


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
