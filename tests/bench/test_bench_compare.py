"""The comparison of two revisions: its table, and a run in a repository of its own."""

import subprocess
from pathlib import Path

import pytest

from bench import compare

BENCH = """
import pytest

@pytest.mark.smoke
def bench_{name}(benchmark):
    benchmark.pedantic(sum, args=([1, 2],), rounds=3)
"""
CONFIGURATION = """
[tool.pytest.ini_options]
python_files = ["bench_*.py"]
python_functions = ["bench_*"]
markers = ["smoke: short"]
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three commits: no bench, one bench, two benches."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # with it benches are not timed
    root = tmp_path / "repository"
    (root / "bench").mkdir(parents=True)
    (root / "pyproject.toml").write_text(CONFIGURATION)
    git(root, "init", "--quiet")
    for commit, name in enumerate(("", "old", "new")):
        if name:
            (root / "bench" / f"bench_{name}.py").write_text(BENCH.format(name=name))
        git(root, "add", ".")
        who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        git(root, *who, "commit", "--quiet", "--message", str(commit))
    return root


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_ratio_is_of_medians_round_by_round_with_its_spread() -> None:
    base = [
        {"a-ours": 1.0, "b-ours": 1.0},
        {"a-ours": 2.0, "b-ours": 1.0},
        {"a-ours": 4.0, "b-ours": 1.0},
    ]
    here = [
        {"a-ours": 0.5, "b-ours": 1.1},
        {"a-ours": 1.8, "b-ours": 0.9},
        {"a-ours": 3.0, "b-ours": 1.2},
    ]
    found = compare.ratios(base, here)  # the slowest-grown first
    assert found == [("b-ours", 1.0, 1.1, 1.1, 0.9, 1.2), ("a-ours", 2.0, 1.8, 0.75, 0.5, 0.9)]
    assert [compare.verdict(found, one) for one in found] == ["", "faster"]  # b's do not agree


OURS = "bench/bench_kernels.py::bench_operators[modulate/256-ours]"
PEER = "bench/bench_kernels.py::bench_operators[modulate/256-official]"
EAGER = "bench/bench_kernels.py::bench_operators[modulate/256-eager]"


def test_ours_are_told_from_peers_and_from_an_empty_python() -> None:
    pipeline = "bench/bench_pipeline.py::bench_startup[startup-{}]"
    named = {OURS: True, PEER: False, OURS.replace("ours", "ours compressed"): True, EAGER: True}
    step = "bench/bench_model.py::bench_denoising[denoise-diffusers{}]"
    named |= {step.format(""): False, step.format(" accelerated"): True}
    named |= {pipeline.format("import pixart"): True, pipeline.format("python"): False}
    found = compare.ratios([dict.fromkeys(named, 1.0)], [dict.fromkeys(named, 1.0)])
    assert {one.bench: one.is_ours for one in found} == named


@pytest.mark.parametrize(
    ("ours", "peer", "code"),
    [
        (1.2, 1.0, 1),
        (1.04, 1.0, 0),
        (0.8, 1.0, 0),
        (1.0, 1.5, 0),  # a peer concerns nobody
        (1.2, 1.3, 0),  # what changes by itself by 30 % tells nothing of 20
        (1.2, 0.7, 0),
        (1.5, 1.3, 1),
    ],
)
def test_only_what_is_ours_and_slower_beyond_the_noise_fails(
    ours: float,
    peer: float,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rounds = {compare.BASE: [{OURS: 1.0, PEER: 1.0}], compare.HERE: [{OURS: ours, PEER: peer}]}
    monkeypatch.setattr(compare, "compare", lambda *arguments: rounds)
    assert compare.main(["HEAD"]) == code
    printed = capsys.readouterr().out
    assert f"{ours:28.2f}{'':23}median of 1 benches of ours\n" in printed
    assert f"{peer:28.2f}{'':23}median of 1 benches of peers\n" in printed
    assert f"\n{code} of ours slower beyond the noise" in printed


def test_neither_our_references_nor_peers_of_another_operator_are_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = "bench/bench_kernels.py::bench_attention[self-sdpa math]"
    before = [dict.fromkeys((OURS, EAGER, PEER, other), 1.0)]
    after = [{OURS: 1.2, EAGER: 1.5, PEER: 1.0, other: 2.0}]
    rounds = {compare.BASE: before, compare.HERE: after}
    monkeypatch.setattr(compare, "compare", lambda *arguments: rounds)
    assert compare.main(["HEAD"]) == 1
    assert compare.slower(compare.ratios(before, after)) == [EAGER, OURS]


def test_both_revisions_run_and_no_worktree_stays(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["HEAD~1", "--rounds", "2"], repository) == 0
    printed = capsys.readouterr()
    assert "bench/bench_old.py::bench_old" in printed.out
    assert printed.out.endswith("not in BASE: bench/bench_new.py::bench_new\n")
    rounds = [line.split(": ")[1] for line in printed.err.splitlines()]
    assert rounds == ["base", "here", "here", "base"]
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert compare.main(["HEAD~2", "--rounds", "1", "-k", "new"], repository) == 2
    assert "the benches failed in" in capsys.readouterr().err  # BASE has none at all


def test_a_bench_that_fails_ends_the_comparison_and_no_worktree_stays(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = BENCH.format(name="new").replace("sum", "len, iterations=0")
    (repository / "bench" / "bench_new.py").write_text(broken)
    assert compare.main(["HEAD", "--rounds", "1"], repository) == 2
    assert "iterations" in capsys.readouterr().err
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize(
    ("base", "rounds", "complaint"),
    [
        ("nowhere", "1", "BASE must be a revision of this repository, got 'nowhere'"),
        ("--all", "1", "BASE must be a revision of this repository, got '--all'"),
        ("HEAD:bench", "1", "BASE must be a revision of this repository, got 'HEAD:bench'"),
        ("HEAD", "0", "--rounds must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    base: str, rounds: str, complaint: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["--rounds", rounds, "--", base], repository) == 2
    assert capsys.readouterr().err == f"bench.compare: {complaint}\n"
