"""Previews of the command line: their files, what is left of them, and pictures in a terminal."""

import base64
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from published import build_sigma
from stub_pipeline import StubPipeline

from pixart.generate import main
from pixart.generation.console import Console
from pixart.generation.options import with_values
from pixart.generation.previews import MARK
from pixart.generation.terminal import TerminalPicture, _Window, protocol_of
from pixart.pipeline.pictures import read_picture
from pixart.sampler.loop import Progress

KNOWN = "a small red circle"
NAME = "outputs/a-small-red-circle-0.png"
ASIDE = "outputs/a-small-red-circle-0-preview.png"


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["--preview", "a cat"], ["--preview=1", "a cat"]),
        (["a cat", "--preview"], ["a cat", "--preview=1"]),
        (["--preview", "5", "a cat"], ["--preview", "5", "a cat"]),
        (["--preview=5", "a cat"], ["--preview=5", "a cat"]),
        (["--preview", "--seed", "3", "a cat"], ["--preview=1", "--seed", "3", "a cat"]),
        (["--preview", "5 cats"], ["--preview=1", "5 cats"]),
        (["--preview", "-1", "a cat"], ["--preview", "-1", "a cat"]),  # to be refused
        (["--", "--preview"], ["--", "--preview"]),
    ],
)
def test_preview_takes_a_number_and_no_prompt(words: list[str], read: list[str]) -> None:
    assert with_values(words) == read


@pytest.fixture
def shown(stub: StubPipeline, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bool]]:
    """The files in outputs/ after each step of the stub's two: name -> whether it is a preview."""
    seen: list[dict[str, bool]] = []
    draw_many = StubPipeline.draw_many

    def watched(self: Any, requests: Any, *, callback: Any, **others: Any) -> Any:
        def and_look(progress: Progress) -> None:
            callback(progress)
            seen.append({p.name: MARK in Image.open(p).info for p in Path("outputs").glob("*.png")})

        return draw_many(self, requests, callback=and_look, **others)

    monkeypatch.setattr(StubPipeline, "draw_many", watched)
    colour = iter(range(255))
    stub.preview = lambda latents: [  # type: ignore[attr-defined]
        Image.new("RGB", (4, 4), (next(colour), 0, 0)) for _ in latents
    ]
    stub.vae = type("VAE", (), {"downsample": 8})()  # type: ignore[attr-defined]
    return seen


def test_a_preview_stands_beside_the_picture_until_that_is_finished(
    shown: list[dict[str, bool]],
) -> None:
    assert main([KNOWN, "--preview"]) == 0
    assert shown == [{Path(ASIDE).name: True}] * 2
    assert os.listdir("outputs") == [Path(NAME).name]


def test_every_so_many_steps_and_the_last(shown: list[dict[str, bool]]) -> None:
    assert main([KNOWN, "--preview", "7"]) == 0
    assert shown == [{}, {Path(ASIDE).name: True}]


def test_pictures_of_several_passes_have_each_their_own(shown: list[dict[str, bool]]) -> None:
    assert main([KNOWN, "--preview", "--num-images", "2", "--output", "outputs/x.jpg"]) == 0
    names = [f"x-000{number}-preview.png" for number in (0, 1)]
    assert [list(files) for files in shown] == [names[:1]] * 2 + [names[1:]] * 2


def test_a_preview_takes_no_place_of_a_picture(shown: list[dict[str, bool]]) -> None:
    """Of this run, or of somebody else's; what a killed run left behind is replaced."""
    Path("outputs").mkdir()
    Image.new("RGB", (3, 3)).save(ASIDE)
    before = Path(ASIDE).read_bytes()
    assert main([KNOWN, "--preview"]) == 0
    assert Path(ASIDE).read_bytes() == before
    assert shown[0] == {Path(ASIDE).name: False, Path(ASIDE.replace(".", "-2.")).name: True}
    assert sorted(os.listdir("outputs")) == sorted([Path(ASIDE).name, Path(NAME).name])


def test_a_preview_takes_no_name_of_the_run(shown: list[dict[str, bool]]) -> None:
    lines = ["x", "x-preview"]
    Path("list.jsonl").write_text("".join(f'{{"prompt": "a", "name": "{n}"}}\n' for n in lines))
    assert main(["--prompts", "list.jsonl", "--preview"]) == 0
    assert shown[0] == {"x-preview-2.png": True}
    assert sorted(os.listdir("outputs")) == ["x-preview.png", "x.png"]
    assert read_picture(Path("outputs/x-preview.png")).metadata.request.prompt == "a"


def test_what_a_killed_run_left_is_no_finished_picture(shown: list[dict[str, bool]]) -> None:
    info = PngInfo()
    info.add_text(MARK, "not finished")
    Path("outputs").mkdir()
    Image.new("RGB", (3, 3)).save(ASIDE, pnginfo=info)
    assert main([KNOWN, "--preview"]) == 0
    assert os.listdir("outputs") == [Path(NAME).name]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no memory")])
def test_nothing_is_left_of_a_run_that_stops(
    shown: list[dict[str, bool]], stub: StubPipeline, error: BaseException
) -> None:
    stub.stop[1] = error
    assert main([KNOWN, "--preview", "--num-images", "3", "--batch", "2"]) != 0
    assert os.listdir("outputs") == [Path(NAME).name]


def test_a_preview_that_cannot_be_written_is_said_and_stops_nothing(
    shown: list[dict[str, bool]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pixart.generation.previews.written_aside", full)
    assert main([KNOWN, "--preview"]) == 0
    said = capsys.readouterr().err
    assert said.count("cannot be written (No space left on device); previews end here") == 1
    assert os.listdir("outputs") == [Path(NAME).name]


def test_a_preview_that_cannot_be_removed_is_said_and_stops_nothing(
    shown: list[dict[str, bool]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    unlink = Path.unlink

    def refused(self: Path, missing_ok: bool = False) -> None:
        if self.name.endswith("-preview.png"):
            raise PermissionError(13, "Permission denied")
        unlink(self, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr("pixart.generation.previews.Path.unlink", refused)
        assert main([KNOWN, "--preview", "--json"]) == 0
    said = capsys.readouterr()
    assert "cannot be removed (Permission denied); previews end here" in said.err
    assert NAME in said.out, "the picture is in the report"


def test_quiet_silences_the_terminal_and_not_the_file(
    shown: list[dict[str, bool]], capfd: Any
) -> None:
    assert main([KNOWN, "--preview", "--quiet"]) == 0
    assert shown[0] == {Path(ASIDE).name: True}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preview", "0"], "--preview must be every 1 or more steps, got 0"),
        (["--preview", "-3"], "--preview must be every 1 or more steps, got -3"),
        (["--preview", "2.5"], "--preview must be a whole number, got '2.5'"),
        (["--taesd", "folder"], "--taesd must come with --preview"),
    ],
)
def test_what_no_run_could_do_is_refused(words: list[str], message: str, capsys: Any) -> None:
    assert main([KNOWN, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_taesd_that_is_none_is_refused_before_anything_is_drawn(
    tmp_path: Path, capsys: Any
) -> None:
    folder = build_sigma(tmp_path / "sigma", sample_size=16, vae_channels=(8, 8, 8, 8))
    model = ["--model", str(folder), "--device", "cpu", "--no-cache"]
    assert main([KNOWN, *model, "--preview", "--taesd", str(folder / "vae")]) == 2
    said = capsys.readouterr().err
    assert "vae: must be an AutoencoderTiny, got 'AutoencoderKL'" in said and "draw" not in said


@pytest.mark.parametrize("batch", ["1", "2"])
def test_previews_change_no_bit(tmp_path: Path, batch: str) -> None:
    folder = build_sigma(tmp_path / "sigma", sample_size=16, vae_channels=(8, 8, 8, 8))
    fixed = ["--model", str(folder), "--device", "cpu", "--steps", "3", "--no-cache"]
    fixed += ["a cat", "a dog", "--batch", batch]
    assert main([*fixed, "--output", "with/{seed}-{prompt}.png", "--preview"]) == 0
    assert main([*fixed, "--output", "without/{seed}-{prompt}.png"]) == 0
    assert sorted(os.listdir("with")) == sorted(os.listdir("without"))
    for name in os.listdir("with"):
        assert Path("with", name).read_bytes() == Path("without", name).read_bytes()


def test_a_picture_that_is_drawn_larger_is_previewed_at_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two in a pass, side by side in the terminal."""
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(Console, "show", lambda _, image: seen.append(image.size))
    folder = build_sigma(tmp_path / "sigma", sample_size=16, vae_channels=(8, 8, 8, 8))
    fixed = ["--model", str(folder), "--device", "cpu", "--steps", "2", "--no-cache", "--quiet"]
    words = ["a cat", "a dog", "--batch", "2", "--upscale", "2x", "--upscale-strength", "0.5"]
    assert main([*fixed, *words, "--preview"]) == 0
    assert seen == [(256, 128)] * 2 + [(512, 256)]
    assert len(os.listdir("outputs")) == 2


TERMINALS: list[tuple[dict[str, str], str | None]] = [
    ({"TERM": "xterm-256color"}, None),
    ({"TERM": "xterm-kitty"}, "kitty"),
    ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
    ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
    ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1", "TMUX": "/tmp/x"}, None),
    ({"TERM": "screen", "TERM_PROGRAM": "iTerm.app"}, None),
    ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
    ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
    ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode"}, None),
    ({"TERM": "foot"}, "sixel"),
    ({}, None),
]


@pytest.mark.parametrize(("environment", "protocol"), TERMINALS, ids=str)
def test_a_terminal_is_known_by_its_environment(
    environment: dict[str, str], protocol: str | None
) -> None:
    assert protocol_of(environment) == protocol


def written(monkeypatch: pytest.MonkeyPatch, protocol: str) -> tuple[TerminalPicture, io.StringIO]:
    stream = io.StringIO()
    window = _Window(80, 40, (8, 16))
    monkeypatch.setattr("pixart.generation.terminal._window", lambda _: window)
    return TerminalPicture(stream, protocol), stream


def noise(width: int, height: int) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def taken(stream: io.StringIO) -> str:
    text = stream.getvalue()
    stream.seek(0)
    stream.truncate()
    return text


@pytest.mark.parametrize("protocol", ["kitty", "iterm2", "sixel"])
def test_a_picture_stands_where_the_last_one_stood_until_something_is_said(
    monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    place, stream = written(monkeypatch, protocol)
    place.show(noise(20, 20))
    first = taken(stream)
    place.show(noise(20, 20))
    again = taken(stream)
    place.leave()
    place.show(noise(20, 20))
    assert first.count("\n") == 16 and again.count("\n") == 0 and taken(stream).count("\n") == 16
    assert re.fullmatch(r"\x1b7\r\x1b\[16A.*\x1b8", again, re.DOTALL)


@pytest.mark.parametrize("protocol", ["kitty", "iterm2"])
def test_kitty_and_iterm2_get_the_picture(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    place, stream = written(monkeypatch, protocol)
    place.show(noise(30, 20))
    text = taken(stream)
    if protocol == "kitty":
        parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
        assert [head[-1] for head, _ in parts] == ["1"] * (len(parts) - 1) + ["0"]
        assert all(len(content) <= 4096 and "q=2" in head for head, content in parts)
        encoded = "".join(content for _, content in parts)
    else:
        [(size, encoded)] = re.findall(r"size=(\d+);[^:]*:([^\x07]*)\x07", text)
        assert len(base64.b64decode(encoded)) == int(size)
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert image.size == (378, 252)  # 16 rows of 16 pixels, less what is no band of sixels


def sixels(text: str) -> np.ndarray:
    """A decoder: (H, W, 3) in percent."""
    [(width, height, body)] = re.findall(r'\x1bP0;1q"1;1;(\d+);(\d+)(.*)\x1b\\', text, re.DOTALL)
    palette, pixels = {}, np.full((int(height), int(width), 3), -1)
    colour, row, column = 0, 0, 0
    for define, number, sign in re.findall(r"#(\d+;2;\d+;\d+;\d+)|(#\d+)|((?:!\d+)?[-$?-~])", body):
        if define:
            index, _, *rgb = map(int, define.split(";"))
            palette[index] = rgb
        elif number:
            colour = int(number[1:])
        elif sign in "-$":
            row, column = row + 6 * (sign == "-"), 0
        else:
            count = int(sign[1:-1]) if len(sign) > 1 else 1
            for bit in range(6):
                if (ord(sign[-1]) - 63) >> bit & 1:
                    pixels[row + bit, column : column + count] = palette[colour]
            column += count
    return pixels


def test_sixels_are_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    place, stream = written(monkeypatch, "sixel")
    image = Image.new("RGB", (40, 20), (250, 20, 30))
    image.paste((0, 128, 255), (10, 5, 25, 15))
    place.show(image)
    drawn = sixels(taken(stream))
    wanted = np.asarray(image.resize(drawn.shape[1::-1])) / 2.55
    assert drawn.min() >= 0 and np.abs(drawn - wanted).mean() < 1


@pytest.mark.parametrize("size", [(16, 16), (4096, 512), (512, 4096), (1, 1), (4000, 10)])
@pytest.mark.parametrize("window", [(80, 24), (200, 60), (20, 9)])
def test_a_picture_fits_into_its_place(size: tuple[int, int], window: tuple[int, int]) -> None:
    rows, (width, height) = _Window(*window, None).area(size, (6, 12))
    assert 1 <= rows <= window[1] // 2 and 1 <= height <= rows * 12
    assert width <= max(6 * window[0], 12 * size[0] // size[1])


def test_a_terminal_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    place, stream = written(monkeypatch, "kitty")
    stream.close()
    place.show(noise(4, 4))
