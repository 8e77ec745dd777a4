import json
import math
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pixart.pipeline import Pipeline
from pixart.shapes.caption import WORDS, describe, parse
from pixart.shapes.scene import draw, sample_scene
from pixart.train import main as train
from pixart.training import evaluation, loop
from pixart.training.autoencoder import anchor_latents
from pixart.training.evaluation import Accuracy, Task, captions, table
from pixart.training.loop import Losses, Optimisation, Stage, build_optimizers, run
from pixart.training.recipe import STAGES
from pixart.training.shapes import pad_ids, sample_batch, train_tokenizer
from pixart.training.state import load_state, save_state

ROOT = Path(__file__).parent.parent
QUICK = Optimisation(steps=6, learning_rate=0.1, warmup_steps=2)


class CharacterTokenizer:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text] + [1]


def _stage(directory: Path, settings: Optimisation = QUICK, poison: int | None = None) -> Stage:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def loss(step: int) -> Losses:
        value = model(torch.randn(8, 3)).square().mean()
        return {"loss": value * (math.nan if step == poison else 1)}

    return Stage("toy", model, loss, settings, directory)


def _weights(stage: Stage) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in (*stage.parameters, *stage.ema)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_training_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MUON_MIN_SIDE", 3)
    settings = replace(QUICK, optimizer=optimizer)
    whole = _stage(tmp_path / "whole", settings)
    assert run(whole)
    assert not run(_stage(tmp_path / "parts", settings), stop_after=3)
    resumed = _stage(tmp_path / "parts", settings)
    assert run(resumed) and resumed.step == 6
    for a, b in zip(_weights(whole), _weights(resumed), strict=True):
        assert torch.equal(a, b)


def test_muon_takes_the_large_matrices_and_adamw_the_rest() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8), nn.LayerNorm(8))
    adamw, muon = build_optimizers(model, replace(QUICK, optimizer="muon"))
    assert [p is model[0].weight for p in muon.param_groups[0]["params"]] == [True]
    assert len(adamw.param_groups[0]["params"]) == 5
    with pytest.raises(ValueError, match="must be .* got 'lion'"):
        build_optimizers(model, replace(QUICK, optimizer="lion"))


def test_training_moves_weights_and_lowers_the_loss(tmp_path: Path) -> None:
    stage = _stage(tmp_path, Optimisation(steps=40, learning_rate=0.05, warmup_steps=1))
    first = stage.advance()["loss"]
    run(stage)
    assert stage.advance()["loss"] < first / 2


def test_a_step_that_explodes_is_skipped_and_said(tmp_path: Path) -> None:
    stage = _stage(tmp_path, poison=0)
    before = _weights(stage)
    assert stage.advance()["skipped"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(stage), strict=True))
    assert stage.advance()["skipped"] == 0.0


def test_a_gradient_far_above_the_usual_is_skipped_after_the_warm_up(tmp_path: Path) -> None:
    stage = _stage(tmp_path)
    stage.step, stage.mean_norm = 3, 1e-9
    assert stage.advance()["skipped"] == 1.0


def test_the_rate_warms_up_stays_and_decays() -> None:
    settings = Optimisation(steps=100, learning_rate=1.0, warmup_steps=10, final_ratio=0.1)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:70] == pytest.approx([1.0] * 61)
    assert rates[-1] == pytest.approx(0.13)
    assert all(a >= b for a, b in zip(rates[70:], rates[71:], strict=False))


def test_a_save_that_fails_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    save_state({"step": 1}, path)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_state({"step": 2}, path)
    assert load_state(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_there_is_no_state_before_the_first_save(tmp_path: Path) -> None:
    assert load_state(tmp_path / "state.pt") is None


def test_sigterm_stops_after_the_step_and_saves(tmp_path: Path) -> None:
    stage = _stage(tmp_path)
    draw_batch = stage.loss

    def loss(step: int) -> Losses:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw_batch(step)

    stage.loss = loss
    assert not run(stage)
    saved = load_state(tmp_path / "state.pt")
    assert saved is not None and saved["step"] == 3


def test_the_log_has_a_line_every_so_many_steps(tmp_path: Path) -> None:
    run(_stage(tmp_path), log_every=2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert {"loss", "norm", "skipped", "steps_per_s"} <= set(lines[0])


def test_anchored_latents_are_block_means_and_the_place_of_brightness() -> None:
    pictures = torch.zeros(1, 3, 16, 16)
    pictures[:, 0] = 0.5
    pictures[:, :, 8:, 12:] = 1.0  # the right half of the last block
    latents = anchor_latents(pictures)
    assert latents.shape == (1, 4, 2, 2)
    assert torch.allclose(latents[0, :3, 0, 0], torch.tensor([0.75, 0.0, 0.0]))
    assert torch.allclose(latents[0, :3, 1, 1], torch.tensor([1.125, 0.75, 0.75]))
    assert latents[0, 3, 0, 0].abs() < 1e-6 < latents[0, 3, 1, 1]


def test_every_word_of_the_grammar_is_one_piece(tmp_path: Path) -> None:
    import sentencepiece

    train_tokenizer(tmp_path / "spiece.model", captions=2000)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    rng = random.Random(0)
    said = {w for k in ("one", "pair", "group") for _ in range(200)
            for w in describe(sample_scene(rng, k), rng).replace(",", "").split()}  # fmt: skip
    assert said <= WORDS
    assert all(len(processor.encode(word)) == 1 for word in said)
    assert [processor.pad_id(), processor.eos_id(), processor.unk_id()] == [0, 1, 2]


def test_some_captions_are_left_empty_for_guidance() -> None:
    batch = sample_batch(random.Random(0), CharacterTokenizer(), 64, 200)
    empty = (batch.mask.sum(1) == 1).float().mean()
    assert 0.04 < empty < 0.18
    assert batch.latents.shape == (200, 4, 8, 8)


def test_ids_are_padded_with_zero_and_masked() -> None:
    ids, mask = pad_ids([[5, 1], [7, 8, 1]])
    assert ids.tolist() == [[5, 1, 0], [7, 8, 1]]
    assert mask.tolist() == [[True, True, False], [True, True, True]]


def _fake_drawing(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    def draw_captions(pipe: object, texts: list[str], size: int, **_: object) -> object:
        task = Task("one", size, count=len(texts))
        rng = random.Random(f"3/{task.kind}/{task.held_out}")
        for _text in texts:
            scene = sample_scene(rng, "one")
            describe(scene, rng, omit=0.0)
            picture = np.full((size, size, 3), 128) if wrong else draw(scene, size)
            yield torch.tensor(picture).permute(2, 0, 1) / 127.5 - 1

    monkeypatch.setattr(evaluation, "draw_captions", draw_captions)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_perfect_model_is_measured_as_such_and_a_blank_one_is_not(
    monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    _fake_drawing(monkeypatch, wrong)
    result = evaluation.measure(None, Task("one", 128, count=10), seed=3, steps=1, guidance=1)  # type: ignore[arg-type]
    assert result.of == 10 and result.right == (0 if wrong else 10)
    assert ("**0.0 %**" if wrong else "**100.0 %**") in table([result])


def test_captions_of_a_task_are_full_and_the_same_every_time() -> None:
    task = Task("pair", 128, count=20)
    texts = captions(task, seed=1)
    assert texts == captions(task, seed=1) != captions(task, seed=2)
    assert all({"relation", "background", "size"} <= {s.kind for s in parse(t)} for t in texts)


def test_the_table_has_a_row_a_task() -> None:
    result = Accuracy(Task("one", 64), right=3, of=4, by_kind={"shape": (3, 4)})
    assert table([result]).splitlines()[-1] == "| 4 × one, 64 px | **75.0 %** | 75.0 |"


def test_the_whole_recipe_trains_and_exports_a_pipeline_that_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    assert train(["shapes", "--output", str(output), "--scale", "0.0005", "--threads", "1"]) == 0
    for stage in STAGES:
        saved = load_state(output / stage / "state.pt")
        assert saved is not None and saved["step"] >= 1
    pipe = Pipeline.from_pretrained(output / "pipeline", device="cpu", cache_dir=None)
    (image,) = pipe("a red circle", height=64, width=64, steps=2)
    assert image.size == (64, 64)
    from diffusers import AutoencoderKL
    from transformers import T5EncoderModel

    AutoencoderKL.from_pretrained(output / "pipeline" / "vae")
    T5EncoderModel.from_pretrained(output / "pipeline" / "text_encoder")


def test_a_stage_without_what_it_builds_on_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(["shapes", "--output", str(tmp_path / "new"), "--stage", "vae-whole"]) == 2
    assert "stage vae-crops must be trained first" in capsys.readouterr().err


def test_a_run_is_not_continued_against_the_users_will(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").mkdir()
    assert train(["shapes", "--output", str(tmp_path), "--resume", "none"]) == 2
    assert "--output must be new" in capsys.readouterr().err


PARALLEL = """
import sys
from pathlib import Path
import torch
from torch import nn
from pixart.training.loop import Optimisation, Stage, run
from pixart.training.parallel import connect, draw_number, rank, share_of
connect()
torch.manual_seed(0)
model = nn.Linear(3, 1)
data = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(1))
def loss(step):
    share = share_of(8)
    return {"loss": model(data[step, rank() * share : (rank() + 1) * share]).square().mean()}
run(Stage("toy", model, loss, Optimisation(steps=6, learning_rate=0.1), Path(sys.argv[1])))
"""


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text(PARALLEL)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for count in ("1", "2"):
        command = [*torchrun, count, str(script), str(tmp_path / count)]
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=120)
    one, two = (load_state(tmp_path / count / "state.pt") for count in ("1", "2"))
    assert one is not None and two is not None and two["step"] == 6
    for name, weight in one["model"].items():
        assert torch.allclose(weight, two["model"][name], atol=1e-6)


def test_the_batch_of_a_step_does_not_depend_on_the_process_that_draws_it() -> None:
    assert loop._step_seed(0, "base", 5) == loop._step_seed(0, "base", 5)
    assert loop._step_seed(0, "base", 5) != loop._step_seed(0, "base", 6)
