"""`python -m bench.compare BASE`: is this working tree faster or slower than the revision BASE?

Both run their own smoke benches, each in processes of its own, in turn: BASE, this tree, this tree,
BASE, and so on. A ratio is this tree's median over BASE's, of one round; what is printed is the
median of the rounds' ratios with the least and the largest. Whatever else the machine does in
the meantime meets both.

A bench is slower if it is in every round, by more than the noise: 5 %, or what a peer of the same
operator, whose code is not ours, seems to have changed by in every round, if that is more. Exit codes:
0 done, 1 a bench of ours is slower, 2 nothing to compare.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.measure.machine import ROOT

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
        """What else is of the same operator, or step: "bench_operators[modulate"."""
        function, _, case = self.bench.partition("[")
        return f"{function}[{case.split('/')[0]}"

    @property
    def change(self) -> float:
        """What all rounds agree on: 0.1 for at least 10 % more in each, 0 if they do not agree."""
        return max(self.least - 1, 0) or min(self.most - 1, 0)

    def verdict(self, noise: float) -> str:
        if abs(self.change) <= noise:
            return ""
        return "slower" if self.change > 0 else "faster"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__.split("\n")[0]
    )
    parser.add_argument("base", help="a revision: a branch, a tag, a commit")
    parser.add_argument("--rounds", type=int, default=3, help="of both revisions (3)")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="which benches, as in pytest")
    options = parser.parse_args(arguments)
    try:
        if options.rounds < 1:
            raise CompareError(f"--rounds must be at least 1, got {options.rounds}")
        rounds = compare(root, options.base, options.rounds, options.k)
    except CompareError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    found = ratios(rounds[BASE], rounds[HERE])
    print(render(found, unmatched(rounds[BASE], rounds[HERE])))
    if not found:
        return 2
    return 1 if slower(found) else 0


def compare(root: Path, base: str, rounds: int, expression: str) -> dict[str, list[Medians]]:
    """Medians of every round, by BASE and HERE. Raises CompareError."""
    commit = resolve(root, base)
    found: dict[str, list[Medians]] = {BASE: [], HERE: []}
    with worktree(root, commit) as tree:
        trees = {BASE: tree, HERE: root}
        order = [BASE, HERE]
        for number in range(rounds):
            for name in order:
                print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
                found[name].append(run(trees[name], expression))
            order.reverse()
    return found


def resolve(root: Path, revision: str) -> str:
    """The commit that a revision means."""
    done = _git(
        root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"
    )
    if done.returncode:
        raise CompareError(f"BASE must be a revision of this repository, got {revision!r}")
    return done.stdout.strip()


@contextmanager
def worktree(root: Path, commit: str) -> Iterator[Path]:
    """A checkout of the commit, gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="bench-compare-"))
    try:
        done = _git(root, "worktree", "add", "--detach", str(folder / "base"), commit)
        if done.returncode:
            raise CompareError(f"git could not check {commit} out: {done.stderr.strip()}")
        yield folder / "base"
    finally:
        shutil.rmtree(folder)
        _git(root, "worktree", "prune")


def run(tree: Path, expression: str) -> Medians:
    """The smoke benches of one tree in a process of their own; empty where it has none."""
    if not any(tree.glob("bench/bench_*.py")):
        return {}
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
        return medians(json.loads(path.read_text(encoding="utf-8")))


def medians(result: Mapping[str, Any]) -> Medians:
    """Of pytest-benchmark's JSON."""
    return {bench["fullname"]: bench["stats"]["median"] for bench in result["benchmarks"]}


def ratios(base: Sequence[Medians], here: Sequence[Medians]) -> list[Ratio]:
    """Of the benches that every round of both has, the slowest-grown first."""
    common = set.intersection(*(set(one) for one in (*base, *here)))
    found = []
    for bench in common:
        before, after = ([one[bench] for one in side] for side in (base, here))
        each = [new / old for old, new in zip(before, after, strict=True)]
        found.append(
            Ratio(bench, median(before), median(after), median(each), min(each), max(each))
        )
    return sorted(found, key=lambda one: (-one.ratio, one.bench))


def noise(found: Sequence[Ratio], bench: Ratio) -> float:
    """By how much a bench must change in this comparison to be told as slower or faster."""
    peers = (one for one in found if one.measures == bench.measures and not one.is_ours)
    return max([NOISE, *(abs(peer.change) for peer in peers)])


def slower(found: Sequence[Ratio]) -> list[Ratio]:
    """The benches of ours that are."""
    return [one for one in found if one.is_ours and one.verdict(noise(found, one)) == "slower"]


def render(found: Sequence[Ratio], remarks: Sequence[str]) -> str:
    """The table, its summary, and remarks."""
    lines = ["this tree over BASE: below 1.00 is faster; least and largest of the rounds"]
    lines.append(f"{'BASE ms':>10} {'here ms':>10} {'ratio':>6} {'spread':>13}          bench")
    for one in found:
        spread = f"{one.least:.2f} to {one.most:.2f}"
        lines.append(
            f"{1e3 * one.base:10.4g} {1e3 * one.here:10.4g} {one.ratio:6.2f} {spread:>13}"
            f"  {one.verdict(noise(found, one)):6}  {one.bench}"
        )
    for name, is_ours in (("ours", True), ("peers", False)):
        side = [one.ratio for one in found if one.is_ours == is_ours]
        if side:
            lines.append(f"{median(side):28.2f}{'':23}median of {len(side)} benches of {name}")
    if found:
        lines.append(f"{len(slower(found))} of ours slower beyond the noise")
    return "\n".join([*lines, *remarks])


def unmatched(base: Sequence[Medians], here: Sequence[Medians]) -> list[str]:
    """What only one of the two has, a line each."""
    everything = set[str]().union(*base, *here)
    if not everything:
        return ["neither revision has such a bench"]
    lines = []
    for name, side in (("BASE", base), ("this tree", here)):
        there = set.intersection(*(set(one) for one in side))
        if there:
            lines += [f"not in {name}: {bench}" for bench in sorted(everything - there)]
        else:
            lines.append(f"{name} has none of these {len(everything)} benches")
    return lines


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
