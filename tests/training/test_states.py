"""Saved states: nothing of them is run, what is damaged is passed over, what they hold goes anywhere."""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_trainer import QUICK, Toy, Wide, make, run, same

from pixart.training import chunks
from pixart.training.earlier_states import read_distributed
from pixart.training.state import damage, latest_state, load_tensors, read_progress
from pixart.training.trainer import Trainer

NEWEST, BEFORE = "step-00000004", "step-00000002"


class Payload:
    """What an attacker's pickle does when it is loaded."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.ran),)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    run(make(folder, save_every=2), stop_after=4)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run that never stopped."""
    one = make(tmp_path_factory.mktemp("whole"))
    assert run(one)
    return one


@pytest.fixture
def saved(tmp_path: Path, stopped: Path) -> Path:
    """Two states of a run."""
    return shutil.copytree(stopped, tmp_path / "run")


def as_before(folder: Path, task: Toy | None = None, **options: Any) -> Path:
    """The newest state of a run, written anew as it was written before states had checksums."""
    one = make(folder, task=task, **options)
    assert one.resume()
    newest = latest_state(folder)
    assert newest is not None
    shutil.rmtree(newest / "state")
    (newest / "checksums.json").unlink()
    dcp.save(one._tensors(), checkpoint_id=newest / "state", no_dist=True)
    return newest


# Code.


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_no_code_in_an_earlier_state_runs(
    saved: Path, tmp_path: Path, file: str, form: str
) -> None:
    newest, ran = as_before(saved), tmp_path / "ran"
    shutil.rmtree(saved / BEFORE)
    place = newest / "state" / file
    hostile = io.BytesIO()
    if form == "zip":
        torch.save(Payload(ran), hostile)
    content = hostile.getvalue() or pickle.dumps(Payload(ran))
    size = place.stat().st_size
    place.write_bytes(content + bytes(max(size - len(content), 0)))
    with pytest.raises(ValueError, match=f"{file}.*") as refused:
        make(saved).resume()
    assert not ran.exists() and "\n" not in str(refused.value)
    pickle.loads(pickle.dumps(Payload(ran)))
    assert ran.exists()  # it would have run


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_what_was_not_saved_with_a_state_is_not_looked_into(
    saved: Path, tmp_path: Path, file: str
) -> None:
    (saved / NEWEST / "state" / file).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ValueError, match=f"state/{file} was not saved with it"):
        make(saved).resume(saved / NEWEST)
    assert make(saved).resume() and not (tmp_path / "ran").exists()


HOSTILE_PLANS: dict[str, Callable[[Any], object]] = {
    "a record is no plan": lambda plan: [plan],
    "another class": lambda plan: contextlib.suppress,
    "a name that is none": lambda plan: change(plan, "state_dict_metadata", {3: 3}),
    "a tensor that is none": lambda plan: change(plan, "state_dict_metadata", {"a": 3}),
    "no places": lambda plan: change(plan, "storage_data", {}),
    "a file elsewhere": lambda plan: move(plan, "../../x"),
    "an absolute file": lambda plan: move(plan, "/dev/zero"),
    "no plan": lambda plan: None,
    "bytes": lambda plan: change(plan, "version", bytearray(9)),
}


def change(plan: Any, name: str, value: object) -> Any:
    setattr(plan, name, value)
    return plan


def move(plan: Any, path: str) -> Any:
    for info in plan.storage_data.values():
        info.relative_path = path
    return plan


@pytest.mark.parametrize("kind", HOSTILE_PLANS)
def test_an_earlier_plan_says_names_and_sizes_or_is_refused(saved: Path, kind: str) -> None:
    folder = as_before(saved) / "state"
    plan = folder / ".metadata"
    plan.write_bytes(pickle.dumps(HOSTILE_PLANS[kind](pickle.loads(plan.read_bytes()))))
    with pytest.raises(ValueError, match=rf"^{plan}: is damaged, or no state"):
        read_distributed(folder)


def test_an_earlier_plan_that_asks_for_much_memory_gets_none(saved: Path) -> None:
    folder = as_before(saved) / "state"
    plan = folder / ".metadata"
    content = plan.read_bytes()
    assert content.startswith(b"\x80") and content.endswith(b".")
    # Of the objects that it has, this one is number 4,294,967,295.
    plan.write_bytes(content[:-1] + b"r\xff\xff\xff\xff.")
    assert read_distributed(folder)


@pytest.mark.parametrize("optimizer", ["came", "adamw", "muon"])
def test_earlier_states_are_gone_on_from_bit_for_bit(tmp_path: Path, optimizer: Any) -> None:
    stage = replace(QUICK, optimizer=replace(QUICK.optimizer, name=optimizer))
    whole, parts = make(tmp_path / "whole", stage, Wide()), tmp_path / "parts"
    assert run(whole)
    run(make(parts, stage, Wide()), stop_after=3)
    as_before(parts, Wide(), stage=stage)
    resumed = make(parts, stage, Wide())
    assert run(resumed) and same(whole, resumed)


# Damage.


def flip(path: Path, place: int = -9) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit of a tensor": (
        lambda s: flip(s / "state" / "00000-0000.safetensors"),
        "state/00000-0000.safetensors has changed since it was saved",
    ),
    "a cut file of tensors": (
        lambda s: os.truncate(s / "state" / "00000-0000.safetensors", 100),
        "state/00000-0000.safetensors has another size than when it was saved",
    ),
    "a file of tensors that is gone": (
        lambda s: (s / "state" / "00000-0000.safetensors").unlink(),
        "state/00000-0000.safetensors is missing",
    ),
    "a flipped bit of the plan": (
        lambda s: flip(s / "state" / "00000.json"),
        "state/00000.json has changed",
    ),
    "no plan": (lambda s: (s / "state" / "00000.json").unlink(), "state/00000.json is missing"),
    "no tensors at all": (lambda s: shutil.rmtree(s / "state"), "state/00000.json is missing"),
    "a flipped bit of an export": (lambda s: flip(s / "exported.pt"), "exported.pt has changed"),
    "another progress": (
        lambda s: (s / "progress.json").write_text("{}"),
        "progress.json has another size",
    ),
    "no progress": (lambda s: (s / "progress.json").unlink(), "progress.json is missing"),
    "no checksums": (lambda s: (s / "checksums.json").unlink(), "checksums.json: cannot be read"),
    "cut checksums": (
        lambda s: os.truncate(s / "checksums.json", 50),
        "checksums.json: is not JSON",
    ),
    "checksums of nothing": (
        lambda s: (s / "checksums.json").write_text('{"files": {}}'),
        "checksums.json does not name progress.json",
    ),
    "checksums elsewhere": (
        lambda s: (s / "checksums.json").write_text('{"files": {"../x": {}}}'),
        "checksums.json: files must lie beside it",
    ),
    "a pipe": (
        lambda s: ((s / "progress.json").unlink(), os.mkfifo(s / "progress.json")),
        "progress.json is missing",
    ),
    "a folder that is gone": (shutil.rmtree, "checksums.json: cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_state_is_passed_over_and_named(
    saved: Path, whole: Trainer, caplog: Any, kind: str
) -> None:
    spoil, reason = DAMAGE[kind]
    spoil(saved / NEWEST)
    resumed = make(saved, save_every=1, keep=1)
    assert run(resumed) and same(whole, resumed)
    said = [record.getMessage() for record in caplog.records]
    line = next(line for line in said if str(saved) in line)
    assert line.startswith(f"{saved / NEWEST} is damaged ({reason}")
    assert line.endswith(f"; going on from {saved / BEFORE}") and "\n" not in line
    assert damage(saved / "step-00000006") is None
    with pytest.raises(ValueError, match="is damaged|must be a saved state"):
        shutil.rmtree(saved / NEWEST, ignore_errors=True)
        make(saved).resume(saved / NEWEST)


@pytest.mark.parametrize("latest", ["", "step-00000009", "../x", "\0" * 200, "\xff"])
def test_a_damaged_name_of_the_newest_state_is_made_up_for(saved: Path, latest: str) -> None:
    (saved / "latest").write_text(latest, encoding="latin-1")
    assert latest_state(saved) == saved / NEWEST
    (saved / "latest").unlink()
    assert latest_state(saved) == saved / NEWEST
    if hasattr(os, "mkfifo"):
        os.mkfifo(saved / "latest")  # it would be waited for
        assert latest_state(saved) == saved / NEWEST


def test_what_a_state_only_links_to_is_not_its_own(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_text("T5")

    class Linking(Toy):
        def export(self, folder: Path) -> None:
            (folder / "hard").hardlink_to(large)
            (folder / "soft").symlink_to(large)

    run(make(tmp_path / "run", task=Linking()), stop_after=1)
    state = tmp_path / "run" / "step-00000001"
    large.unlink()
    assert damage(state) is None
    assert "hard" not in (state / "checksums.json").read_text()


def test_where_no_state_is_whole_all_are_named_and_none_is_begun(saved: Path) -> None:
    for name in (BEFORE, NEWEST):
        flip(saved / name / "state" / "00000-0000.safetensors")
    with pytest.raises(ValueError, match=rf"{NEWEST} is damaged.*{BEFORE} is damaged.*--output"):
        make(saved).resume()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: os.truncate(path, 3000),
        lambda path: flip(path, path.read_bytes().index(b"_rebuild_tensor")),
    ],
)
def test_damaged_earlier_states_are_passed_over(saved: Path, spoil: Any) -> None:
    newest = as_before(saved)
    assert latest_state(saved) == newest
    spoil(newest / "state" / "__0_0.distcp")
    assert latest_state(saved) == saved / BEFORE


WRONG_PROGRESS = [
    ({"step": "x"}, "step must be of type int, got 'x'"),
    ({"step": -1}, "step must be of type int, got -1"),
    ({"step": True}, "step must be of type int, got True"),
    ({"step": 1, "mean_norm": float("nan")}, "mean_norm must be of type float, got nan"),
    ({"step": 1, "seconds": [1]}, r"seconds must be of type float, got \[1\]"),
    ({"step": 1, "scaler": 3}, "scaler must be of type dict, got 3"),
    ({"step": 1, "stage": None}, "stage must be of type str, got None"),
    ({}, "must say the step, it does not"),
]


@pytest.mark.parametrize(("values", "message"), WRONG_PROGRESS)
def test_progress_of_another_kind_is_refused(tmp_path: Path, values: Any, message: str) -> None:
    (tmp_path / "progress.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"^{tmp_path}/progress.json: {message}"):
        read_progress(tmp_path)


# Tensors.


def test_what_two_processes_wrote_one_reads_and_half_of_it_another(
    tmp_path: Path, monkeypatch: Any
) -> None:
    tensors = {"model": {"a": torch.randn(5, 3), "b": torch.tensor(2.0)}}
    rows = {0: slice(0, 3), 1: slice(3, 5)}
    for process in (0, 1):
        monkeypatch.setattr(chunks, "rank", lambda process=process: process)
        part = rows[process]

        def region(tensor: Any, part: slice = part, process: int = process) -> Any:
            if tensor.ndim == 0:
                return ((), ()) if process == 0 else None
            return (part.start, 0), (part.stop - part.start, 3)

        monkeypatch.setattr(chunks, "own_region", region)
        monkeypatch.setattr(chunks, "local", lambda t, part=part: t[part] if t.ndim else t)
        chunks.write_chunks(tmp_path, tensors)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 4
    read = {"model": {"a": torch.full((5, 3), torch.nan), "b": torch.tensor(torch.nan)}}
    with contextlib.ExitStack() as stack:
        saved = chunks.read_chunks(tmp_path, stack)
        chunks.fill(chunks.flatten(read), saved, tmp_path)
        half = torch.full((2, 3), torch.nan)
        chunks._fill(half, replace(saved["model.a"], size=(2, 3)), "half")
    assert all(torch.equal(read["model"][name], value) for name, value in tensors["model"].items())
    assert torch.equal(half, tensors["model"]["a"][:2])


def test_tensors_are_written_to_several_files(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(chunks, "FILE_BYTES", 40)
    tied = torch.randn(4)
    tensors = {"model": {f"{n}": torch.randn(3) for n in range(9)} | {"x": tied, "y": tied}}
    chunks.write_chunks(tmp_path, tensors)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    read = {"model": {name: torch.empty_like(one) for name, one in tensors["model"].items()}}
    with contextlib.ExitStack() as stack:
        chunks.fill(chunks.flatten(read), chunks.read_chunks(tmp_path, stack), tmp_path)
    assert all(map(torch.equal, read["model"].values(), tensors["model"].values()))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values["tensors"]["model.a"])
    path.write_text(json.dumps(values))


WRONG_PLANS: dict[str, tuple[Callable[[Path], object], str]] = {
    "of another size": (lambda p: edit(p, lambda e: e.update(size=[9, 3])), "must be of size"),
    "beyond its size": (lambda p: edit(p, lambda e: e.update(start=[1, 0])), "must lie within"),
    "absurd": (lambda p: edit(p, lambda e: e.update(part=[1 << 70, 3])), "must lie within"),
    "of half": (lambda p: edit(p, lambda e: e.update(part=[2, 3])), "must be of size"),
    "of text": (lambda p: edit(p, lambda e: e.update(start="00")), "whole numbers, got '00'"),
    "of a file elsewhere": (
        lambda p: edit(p, lambda e: e.update(file="../x.safetensors")),
        "must be a file's name",
    ),
    "of no file": (lambda p: edit(p, lambda e: e.update(file="x")), "x: must be a file"),
    "without the tensor": (lambda p: p.write_text('{"tensors": {}}'), "holds no model.a"),
    "without tensors": (lambda p: p.write_text("{}"), "tensors must be a JSON object"),
    "of a header without end": (
        lambda p: (p.parent / "00000-0000.safetensors").write_bytes(struct.pack("<Q", 1 << 60)),
        "00000-0000.safetensors: is truncated or damaged",
    ),
}


@pytest.mark.parametrize("kind", WRONG_PLANS)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "state").mkdir()
    tensors = {"model": {"a": torch.randn(5, 3)}}
    chunks.write_chunks(tmp_path / "state", tensors)
    spoil, message = WRONG_PLANS[kind]
    spoil(tmp_path / "state" / "00000.json")
    with pytest.raises(ValueError, match=message) as refused:
        load_tensors(tmp_path, tensors)
    assert str(refused.value).startswith(f"{tmp_path} must hold what this stage trains")
    assert "\n" not in str(refused.value)
