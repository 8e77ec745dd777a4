import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pixart import process
from pixart.training import state, trainer
from pixart.training.optimizers import OptimizerSettings
from pixart.training.progress import Progress
from pixart.training.stage import Batch, Stage
from pixart.training.state import StateSaveError, latest_state, load_average
from pixart.training.trainer import StopSignals, Trainer, TrainingFailed
from pixart.weights import check_finite

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
QUICK = Stage(
    "toy",
    batch=Batch(images=8),
    steps=6,
    ema=0.9,
    optimizer=OptimizerSettings(learning_rate=0.05, warmup_steps=2, clip_norm=1.0),
)


class Toy:
    """Fits a plane; the data of a step are a function of its number."""

    def __init__(self, poison: tuple[int, ...] = ()) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.poison, self.exported = poison, 0

    def load(self, step: int, parts: int) -> list[Any]:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        if step in self.poison:
            x *= math.nan
        return list(x.chunk(parts))

    def losses(self, model: nn.Module, part: Any) -> dict[str, Any]:
        return {"loss": (model(part) - part.sum(1, keepdim=True)).square().mean()}

    def images(self, part: Any) -> int:
        return len(part)

    def tokens(self, part: Any) -> int:
        return 4 * len(part)

    def flops(self, part: Any) -> float:
        return 8.0 * len(part)

    def export(self, folder: Path) -> None:
        torch.save(self.model.state_dict(), folder / "exported.pt")

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        return {"loss": float(step)}


class Wide(Toy):
    """With a matrix that is large enough for Muon and for 8-bit states, also when cut in two."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(3, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 1)]
        self.model = nn.Sequential(*layers)


def make(folder: Path, stage: Stage = QUICK, task: Toy | None = None, **options: Any) -> Trainer:
    return Trainer(task or Toy(), stage, folder, CPU, **options)


def run(one: Trainer, stop_after: int | None = None) -> bool:
    return one.run(Progress(one.directory, one.stage.name, every=1, quiet=True), stop_after)


def weights(one: Trainer) -> list[torch.Tensor]:
    assert one.ema is not None
    return [t.detach().clone() for t in (*one.parameters, *one.ema.tensors)]


def same(one: Trainer, other: Trainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize("stop_after", [0, 3])
@pytest.mark.parametrize("optimizer", ["came", "adamw", "muon", "adamw-8bit"])
def test_resumed_training_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, optimizer: Any, stop_after: int
) -> None:
    if optimizer == "adamw-8bit":
        pytest.importorskip("torchao")
    stage = replace(QUICK, optimizer=replace(QUICK.optimizer, name=optimizer))
    whole = make(tmp_path / "whole", stage, Wide())
    assert run(whole)
    assert not run(make(tmp_path / "parts", stage, Wide()), stop_after)
    resumed = make(tmp_path / "parts", stage, Wide())
    assert run(resumed) and resumed.step == 6
    assert same(whole, resumed)


CUT = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from test_trainer import CPU, QUICK, Wide, make, run, weights
from pixart.distributed import connect, leave, local, rank
connect(CPU)
Wide.export = lambda *_: None
for name in sys.argv[2:]:
    stage = replace(QUICK, parallel="fsdp", optimizer=replace(QUICK.optimizer, name=name))
    folder = Path(sys.argv[1]) / name
    folders = (folder / "whole", folder, folder)
    whole, *stopped = (make(one, stage, Wide()) for one in folders)
    run(whole)
    for stop_after, one in zip((0, 2), stopped):
        run(one, stop_after)
    resumed = make(folder, stage, Wide())
    run(resumed)
    parts = [[local(t) for t in weights(one)] for one in (whole, resumed)]
    assert all(map(torch.equal, *parts)), name
    torch.save(parts[0], Path(sys.argv[1]) / f"{name}-{rank()}.pt")
leave(0)
"""


def resume_cut(folder: Path, *optimizers: str) -> None:
    folder.mkdir()
    script = folder / "cut.py"
    script.write_text(CUT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", str(script), str(folder), *optimizers]
    paths = ":".join(str(ROOT / source) for source in (".", "kernels", "tests/training"))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=env, check=True, timeout=300)


def test_resumed_training_equals_uninterrupted_where_weights_are_cut(tmp_path: Path) -> None:
    resume_cut(tmp_path / "run", "came", "adamw", "muon")


def test_so_it_does_with_8_bit_states_also_where_their_step_is_compiled_already(
    tmp_path: Path, monkeypatch: Any
) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    for folder in ("first", "second"):
        resume_cut(tmp_path / folder, "adamw-8bit")
    for part in ("adamw-8bit-0.pt", "adamw-8bit-1.pt"):
        first, second = (torch.load(tmp_path / folder / part) for folder in ("first", "second"))
        assert all(map(torch.equal, first, second))


def test_parts_of_a_step_add_up_to_the_step(tmp_path: Path) -> None:
    whole, parts = (
        make(tmp_path / "a"),
        make(tmp_path / "b", replace(QUICK, batch=Batch(8, None, 4))),
    )
    run(whole), run(parts)
    for a, b in zip(weights(whole), weights(parts), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_what_is_exported_holds_the_averages(tmp_path: Path) -> None:
    one = make(tmp_path)
    run(one)
    state = latest_state(tmp_path)
    assert state is not None and state.name == "step-00000006"
    exported = torch.load(state / "exported.pt")
    assert one.ema is not None
    for value, average in zip(exported.values(), one.ema.tensors, strict=True):
        assert torch.equal(value, average)


def test_a_step_that_is_not_finite_is_skipped_and_reported(tmp_path: Path) -> None:
    one = make(tmp_path, task=Toy(poison=(3,)))
    assert run(one)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 0, 0]
    assert all(p.isfinite().all() for p in one.parameters)


def test_a_gradient_far_above_the_usual_is_skipped_after_the_warm_up(tmp_path: Path) -> None:
    one = make(tmp_path)
    one.mean_norm, one.accepted = 1.0, trainer.FIRST_NORMS
    one.step = QUICK.optimizer.warmup_steps
    assert not one._accept(13.0) and not one._accept(math.inf) and one._accept(9.0)
    one.step = 0
    assert one._accept(1e6)


def test_without_a_warm_up_the_first_norms_tell_what_is_usual(tmp_path: Path) -> None:
    cold = replace(QUICK, steps=30, optimizer=replace(QUICK.optimizer, warmup_steps=0))
    one = make(tmp_path, cold)
    assert run(one) and one.skipped == 0
    # As with fp16, whose first steps are skipped until its scale is found.
    late = make(tmp_path / "late", cold)
    for late.step in range(30):
        norm = 0.1 if late.step == 15 else 1.5  # the first alone would make all others outliers
        assert late._accept(math.nan if late.step < 15 else norm) == (late.step >= 15)
    assert late.mean_norm == pytest.approx((0.1 + 14 * 1.5) / 15)
    assert not late._accept(15.0) and late._accept(13.0)


def test_a_run_that_only_skips_stops_and_names_the_last_good_state(tmp_path: Path) -> None:
    stage = replace(QUICK, steps=100)
    run(make(tmp_path, stage), stop_after=2)
    with pytest.raises(TrainingFailed, match="step-00000002"):
        run(make(tmp_path, stage, Toy(poison=tuple(range(2, 100)))))
    assert latest_state(tmp_path) == tmp_path / "step-00000002"


def test_only_the_newest_states_are_kept(tmp_path: Path) -> None:
    run(make(tmp_path, save_every=1, keep=3))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        f"step-0000000{step}" for step in (4, 5, 6)
    ]


def test_a_wall_clock_budget_ends_a_stage_also_over_several_runs(tmp_path: Path) -> None:
    one = make(tmp_path, replace(QUICK, hours=1.0))
    one.seconds = 3599.999
    assert one.run(Progress(tmp_path, "toy", quiet=True)) and one.step == 1
    again = make(tmp_path, replace(QUICK, hours=1.0))
    assert again.run(Progress(tmp_path, "toy", quiet=True)) and again.step == 1


def test_a_wall_clock_budget_counts_validation_and_saving(tmp_path: Path, monkeypatch: Any) -> None:
    now = 0.0

    def work(*_: Any) -> dict[str, float]:
        nonlocal now
        now += 1000.0
        return {}

    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(trainer, "time", clock)
    monkeypatch.setattr(Toy, "validate", work)
    monkeypatch.setattr(Toy, "export", work)
    validation = replace(QUICK.validation, every=1)
    stage = replace(QUICK, hours=1.5, validation=validation)  # 5400 seconds
    one = make(tmp_path, stage, save_every=1)
    assert not run(one, stop_after=2)  # validation, export, validation; export
    assert one.seconds == 3000.0
    again = make(tmp_path, stage, save_every=1)
    assert run(again) and again.step == 4 and again.seconds == 6000.0
    assert run(make(tmp_path, stage))
    assert latest_state(tmp_path) == tmp_path / "step-00000004"


def test_steps_between_saves_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--save-every must be at least 1, got 0; a number"):
        make(tmp_path, save_every=0)


def test_sigterm_stops_after_the_step_and_saves(tmp_path: Path) -> None:
    one = make(tmp_path, replace(QUICK, steps=100_000))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert not run(one)
    state = latest_state(tmp_path)
    assert state is not None and state.name == f"step-{one.step:08d}"


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_a_closed_terminal_stops_as_ctrl_c_does_unless_it_is_ignored(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(signal, name)
    monkeypatch.setattr(process.ENDING, "asked", None)
    before = signal.getsignal(number)
    with StopSignals() as stop:
        signal.raise_signal(number)
    assert stop.asked and process.ENDING.asked == number and signal.getsignal(number) == before
    signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals() as stop:
            signal.raise_signal(number)
        assert not stop.asked and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_log_is_cut_to_where_a_run_is_taken_up(tmp_path: Path) -> None:
    run(make(tmp_path), stop_after=3)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 4, "loss": 1}\n{"step": 5, "lo')
    run(make(tmp_path))
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_what_interrupted_saves_left_goes_with_the_next_one(tmp_path: Path) -> None:
    left = tmp_path / ".step-00000001.tmp" / "state"
    left.mkdir(parents=True)
    run(make(tmp_path), stop_after=2)
    names = ["latest", "log.jsonl", "step-00000002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("where", ["write_chunks", "write_json", "publish"])
def test_a_full_disk_is_one_clear_error_and_the_last_state_stays(
    tmp_path: Path, monkeypatch: Any, where: str
) -> None:
    run(make(tmp_path), stop_after=2)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, where, full)
    with pytest.raises(StateSaveError, match="No space left on device.*step-00000002"):
        run(make(tmp_path))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    resumed = make(tmp_path)
    assert resumed.resume() and resumed.step == 2


def test_loss_scaling_finds_its_scale_without_giving_up(tmp_path: Path) -> None:
    class Steep(Toy):
        def losses(self, model: nn.Module, part: Any) -> dict[str, Any]:
            return {"loss": 2.0**30 * super().losses(model, part)["loss"]}

    one = make(tmp_path, replace(QUICK, precision="fp16", steps=50), Steep())
    one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    assert run(one)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    skipped = [line["skipped"] for line in lines]
    assert all(skipped[: trainer.MAX_SKIPPED + 1]) and not skipped[-1]


def test_what_is_not_finite_at_any_scale_ends_a_run_in_fp16_too(tmp_path: Path) -> None:
    stage = replace(QUICK, precision="fp16", steps=100)
    run(make(tmp_path, stage), stop_after=2)
    poisoned = make(tmp_path, stage, Toy(poison=tuple(range(2, 100))))
    with pytest.raises(TrainingFailed, match="step-00000002"):
        run(poisoned)
    assert latest_state(tmp_path) == tmp_path / "step-00000002"
    assert poisoned.scaler.get_scale() > 0


def test_validation_sees_the_averages_and_leaves_the_model_training(tmp_path: Path) -> None:
    stage = replace(QUICK, validation=replace(QUICK.validation, every=3))
    one = make(tmp_path, stage)
    run(one)
    assert one.model.training
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    seen = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert seen == [3.0, 6.0]


def test_the_bar_shows_loss_rates_and_memory(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    one = make(tmp_path, QUICK)
    one.run(Progress(tmp_path, "toy", every=1, peak=1e12), 1)
    bar = next(shown for shown in capsys.readouterr().err.split("\r") if "loss" in shown)
    for name in ("loss=", "img/s=", "tok/s=", "wait=", "GB=", "MFU="):
        assert name in bar


def test_a_run_that_goes_on_from_an_older_state_keeps_it(tmp_path: Path) -> None:
    stage = replace(QUICK, steps=6)
    one = make(tmp_path, stage, save_every=2)
    run(one)
    older = tmp_path / "step-00000004"
    again = make(tmp_path, stage, save_every=1)
    assert again.run(Progress(tmp_path, stage.name, quiet=True), start_from=older)
    assert older.exists() and same(one, again)
    with pytest.raises(ValueError, match="must be a saved state"):
        again.resume(tmp_path / "absent")
    with pytest.raises(ValueError, match="must name a state of stage other"):
        make(tmp_path, replace(stage, name="other")).resume(older)


def test_a_state_that_was_being_replaced_is_found(tmp_path: Path) -> None:
    run(make(tmp_path, QUICK))
    newest = latest_state(tmp_path)
    assert newest is not None
    aside = newest.rename(tmp_path / f".{newest.name}.old")
    assert latest_state(tmp_path) == aside and make(tmp_path, QUICK).resume()


def test_without_an_average_the_next_stage_takes_the_last_weights(tmp_path: Path) -> None:
    one = make(tmp_path, replace(QUICK, ema=None))
    run(one)
    newest, other = latest_state(tmp_path), make(tmp_path / "next", QUICK)
    assert newest is not None
    load_average(newest, other.model)
    trained, taken = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(trained[name], taken[name]) for name in trained)


# A run for each line that it is sent, in a fork: what all import is imported once.
KILLED = """
import os, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from dataclasses import replace
from test_trainer import CPU, QUICK, Toy, make
from pixart import files
from pixart.training.progress import Progress
flush = files.flush
def slow(path):
    if path.parent.suffix == ".tmp":
        print("saving", flush=True)
    time.sleep(0.002)  # most of a save is waiting for a disk
    flush(path)
files.flush = slow
for _ in sys.stdin:
    child = os.fork()
    if not child:
        one = make(Path(sys.argv[1]), replace(QUICK, steps=300), save_every=1)
        print("ready", os.getpid(), flush=True)
        one.run(Progress(one.directory, "toy", quiet=True, every=1))
        print("done", flush=True)
        os._exit(0)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_weights_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    rng, during_save = random.Random(0), 0
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "training")]
    command = [sys.executable, str(script), str(tmp_path / "run"), *paths]

    def start() -> int:
        told.write("\n")
        told.flush()
        ready, number = printed.readline().split()
        assert ready == "ready"
        return int(number)

    def rest() -> list[str]:
        """What it says until it has ended, with what that was."""
        lines: list[str] = []
        while not lines or not lines[-1].startswith("ended"):
            lines.append(printed.readline().strip() or "ended without a word")
        return lines

    def unfinished() -> set[tuple[str, int]]:
        return {(p.name, p.stat().st_ctime_ns) for p in (tmp_path / "run").glob(".step-*.tmp")}

    forks = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert forks.stdin is not None and forks.stdout is not None
    told, printed = forks.stdin, forks.stdout
    for kill in range(20):
        left_by_others = unfinished()
        child = start()
        if kill % 2:
            time.sleep(rng.uniform(0.0, 0.4))
        else:  # in a save: after some file of it was written, before or while the next one is
            for _ in range(rng.randrange(1, 40)):
                assert printed.readline() == "saving\n"
            time.sleep(rng.uniform(0.0, 0.002))
        os.kill(child, signal.SIGKILL)
        assert rest()[-1] == f"ended {-signal.SIGKILL}"
        during_save += not unfinished() <= left_by_others
    assert during_save >= 10
    start()
    assert rest()[-2:] == ["done", "ended 0"]
    told.close()
    assert forks.wait() == 0
    stage = replace(QUICK, steps=300)
    whole, survivor = make(tmp_path / "whole", stage), make(tmp_path / "run", stage)
    run(whole)
    assert survivor.resume() and survivor.step == 300
    assert same(whole, survivor)


class Diverging(Toy):
    """Whose weights, averages or optimizer states stop being numbers at a step, in one place."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def spoil(self, one: Trainer) -> None:
        optimizer = next(iter(one.optimizers[0].state.values()))
        tensors = {
            "0.bias": one.parameters[1],
            "00001": one.ema.tensors[1] if one.ema else one.parameters[1],
            "exp_avg": optimizer["exp_avg"],
        }
        with torch.no_grad():
            tensors[self.place].flatten()[0] = math.inf


@pytest.mark.parametrize("place", ["0.bias", "00001", "exp_avg"])
def test_what_is_not_finite_is_never_saved(tmp_path: Path, place: str) -> None:
    task = Diverging(place)
    one = make(tmp_path, replace(QUICK, optimizer=replace(QUICK.optimizer, name="adamw")), task)
    run(one, stop_after=2)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    task.spoil(one)
    message = f"stage toy: step 2 is not saved: .*{place}.*the last good state is .*step-00000002"
    with pytest.raises(TrainingFailed, match=message):
        one.save()
    assert before == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))


def test_8_bit_states_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    stage = replace(QUICK, optimizer=replace(QUICK.optimizer, name="adamw-8bit"))
    one = make(tmp_path, stage, Wide())
    run(one, stop_after=1)
    state = one.optimizers[0].state[one.parameters[2]]
    state["exp_avg"].scale[0] = math.nan
    with pytest.raises(TrainingFailed, match="not saved: optimizer must be finite.*scale"):
        one.save()


def test_a_rate_that_blows_weights_up_ends_in_one_line_with_the_state_before(
    tmp_path: Path,
) -> None:
    run(make(tmp_path), stop_after=2)
    one = make(tmp_path, replace(QUICK, steps=4, optimizer=replace(QUICK.optimizer)))
    object.__setattr__(one.stage.optimizer, "learning_rate", 1e38)  # which no recipe can say
    with pytest.raises(TrainingFailed, match="is not saved: weights must be finite.*00000002"):
        run(one)
    assert latest_state(tmp_path) == tmp_path / "step-00000002"
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step-00000002"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_loss_that_is_not_finite_skips_its_step_whatever_its_gradient(
    tmp_path: Path, precision: Any
) -> None:
    class Endless(Toy):
        def losses(self, model: nn.Module, part: Any) -> dict[str, Any]:
            return {"loss": super().losses(model, part)["loss"] + math.inf}

    one = make(tmp_path, replace(QUICK, steps=100, precision=precision), Endless())
    before = weights(one)
    with pytest.raises(TrainingFailed, match="20 steps in a row .*loss inf"):
        run(one)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(one), strict=True))
    assert latest_state(tmp_path) is None


def test_a_state_that_is_not_finite_is_not_gone_on_from(tmp_path: Path, monkeypatch: Any) -> None:
    one = make(tmp_path)
    with torch.no_grad():
        one.parameters[0].fill_(math.nan)
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "not_finite", lambda *_: None)  # as states were saved before
        one.save()
    with pytest.raises(ValueError, match="step-00000000: weights must be finite, got NaN or inf"):
        make(tmp_path).resume()


def test_an_export_that_is_not_finite_leaves_the_state_before(tmp_path: Path) -> None:
    """As weights that are finite in fp32 and none in the fp16 of a pipeline."""

    class Overflowing(Toy):
        def export(self, folder: Path) -> None:
            check_finite({"weight": torch.tensor(1e5).half()}, "the vae to be saved")

    run(make(tmp_path), stop_after=2)
    with pytest.raises((StateSaveError, TrainingFailed), match="the vae to be saved: must be fin"):
        run(make(tmp_path, task=Overflowing()))
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step-00000002"]
