"""The converter: every format, what it prints, and its exit codes."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import CONV, FORMATS, SIGMA, assert_same, build, official, save_official

from pixart.checkpoint import save
from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.config import KVCompression
from pixart.convert import main


def convert(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("to", FORMATS)
def test_every_format_converts_to_every_format(tmp_path: Path, source: str, to: str) -> None:
    save_transformer(build(CONV), tmp_path / FORMATS[source])
    destination = tmp_path / "new" / FORMATS[to]
    assert convert(tmp_path / FORMATS[source], destination, "--to", to) == 0
    assert_same(load_transformer(destination), build(CONV))


def test_the_result_is_printed_and_assumptions_are_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    state = official(positions=False)
    source, destination = save_official(tmp_path / "m.pth", state), tmp_path / "m.safetensors"
    assert convert(source, destination, "--dtype", "bf16") == 0
    out, _ = capsys.readouterr()
    count = sum(parameter.numel() for parameter in build().parameters())
    assert out == f"{destination}: {count:,} parameters, bfloat16\n"
    assert "pos_embed is absent: assumed 1024 px" in caplog.text
    assert load_transformer(destination).dtype == torch.bfloat16


def test_options_reach_the_checkpoint(tmp_path: Path) -> None:
    narrow = replace(SIGMA, hidden_size=64, num_heads=2, mlp_ratio=2.0)
    average = {name: tensor + 1 for name, tensor in official(narrow).items()}
    torch.save({"state_dict": official(narrow), "state_dict_ema": average}, tmp_path / "m.pth")
    (tmp_path / "config.json").write_text(json.dumps(narrow.to_dict()))
    options = ["--ema", "--config", tmp_path / "config.json", "--kv-compress", "0-1:4"]
    sharded = ["--max-shard-size", "100KB"]
    assert convert(tmp_path / "m.pth", tmp_path / "out", *options, *sharded) == 0
    assert len(list(tmp_path.glob("out/*.index.json"))) == 1
    model = load_transformer(tmp_path / "out")
    assert model.config == replace(narrow, kv_compression=KVCompression([0, 1], 4))
    assert torch.equal(model.t_block[1].bias, average["t_block.1.bias"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["missing.pth", "out"], "missing.pth: no such file or directory"),
        (["notes.txt", "out"], "neither a safetensors nor a PyTorch file"),
        (["m.pth", "out.bin"], "format must be"),
        (["m.pth", "notes.txt", "--to", "pixart"], "exists and is no pixart checkpoint"),
        (["m.pth", "m.pth"], "DST must not be SRC without --overwrite"),
        (["m.pth", "out", "--ema"], "no averaged weights"),
        (["m.pth", "out", "--variant", "fp16"], "variant is for diffusers directories"),
        (["m.pth", "out", "--kv-compress", "x"], "kv_compress must be"),
        (["m.pth", "out", "--config", "notes.txt"], "notes.txt: is not JSON"),
        (["m.pth", "out", "--config", "c.json"], "c.json: mlp_ratio must be a positive number"),
        (["large.pth", "out", "--dtype", "fp16"], "t_block.1.bias must fit into float16"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("hello")
    Path("c.json").write_text('{"mlp_ratio": "4"}')
    state = official()
    save_official(Path("m.pth"), state)
    state["t_block.1.bias"] += 70_000
    save_official(Path("large.pth"), state)
    assert convert(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pixart.convert: ") and err.count("\n") == 1
    assert reason in err
    assert Path("notes.txt").read_text() == "hello" and not Path("out").exists()


def test_the_source_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    save_transformer(build(), tmp_path / "m.pth")
    assert convert(tmp_path / "m.pth", tmp_path / "m.pth", "--dtype", "fp16", "--overwrite") == 0
    assert_same(load_transformer(tmp_path / "m.pth"), build(SIGMA, torch.float16))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["a", "b", "--to", "onnx"],
            "--to must be one of bf16, comfyui, diffusers, fp32, fp8, official, pixart, got 'onnx'",
        ),
        (["a", "b", "--fast"], "unknown option --fast"),
        ([], "SRC, DST must be given"),
    ],
)
def test_unknown_options_are_exit_code_2_and_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert convert(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"pixart.convert: {reason}; ") and err.count("\n") == 1


def test_cancelling_is_exit_code_130_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    save_official(tmp_path / "m.pth", official())
    monkeypatch.setattr(save, "save_transformer", interrupted)
    assert convert(tmp_path / "m.pth", tmp_path / "out") == 130
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_exit_code_1_and_leaves_nothing(tmp_path: Path) -> None:
    save_official(tmp_path / "m.pth", official(positions=False))
    # A process that may write no file over 50 kB meets the error that a full disk gives.
    program = (
        "import resource, sys; from pixart.convert import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
        "print(*[main([sys.argv[1], name]) for name in sys.argv[2:]])"
    )
    outputs = [str(tmp_path / name) for name in ("out.pth", "out.safetensors", "out")]
    command = [sys.executable, "-c", program, str(tmp_path / "m.pth"), *outputs]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.stdout == "1 1 1\n", done.stderr
    remarks = [line for line in done.stderr.splitlines() if "pixart.convert: " not in line]
    errors = [line for line in done.stderr.splitlines() if "pixart.convert: " in line]
    assert any("pos_embed is absent" in line for line in remarks)
    for output, line in zip(outputs, errors, strict=True):
        assert line.startswith(f"pixart.convert: {output}: cannot be written (")
        assert line.endswith("; nothing was changed")
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


def test_help_answers_quickly_and_without_torch() -> None:
    started = time.perf_counter()
    command = [sys.executable, "-X", "importtime", "-m", "pixart.convert", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0 and "--max-shard-size" in done.stdout
    assert "| torch\n" not in done.stderr and "tyro" in done.stderr
    assert time.perf_counter() - started < 1.5


def _environment() -> dict[str, str]:
    import os

    root = Path(__file__).parent.parent.parent
    return os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
