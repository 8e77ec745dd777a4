"""Requests out of damaged and hostile files, and drawings that come to nothing: a picture, or one line that
names the file; never a traceback, a black picture or a lost report."""

import json
import logging
import os
import random
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from stub_pipeline import StubPipeline, opened

from pixart import process
from pixart.command import run_command
from pixart.generate import main, run
from pixart.generation.console import Console
from pixart.generation.jobs import plan
from pixart.generation.options import Options
from pixart.generation.report import Report
from pixart.pipeline.pictures import KEY

DEEP = "[" * 100_000
HUGE = "9" * 5000
VALUES = [
    None, True, -1, 0, 2**70, 10**40, 1e308, -1e308, float("nan"), float("inf"), "", "x" * 5000, "../..",
    "\ud800", "a\0b", "~nobody/x", "/dev/zero", [], [[]], [1, 2], {}, {"a": 1}, "nan",
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def outcome(capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[int, str]:
    """The code, and the last line on standard error, as of a command line that has been read."""
    capsys.readouterr()
    asked = Options(output=Path("out"), **options)
    code = run_command("generate", lambda: run(asked, Report()))
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    return code, lines[-1] if lines else ""


@pytest.mark.parametrize(
    "line",
    [
        DEEP, '{"prompt": ' + DEEP, '{"prompt": "a\\ud800b"}', '{"prompt": "a", "name": 1e999}',
        f'{{"prompt": "a", "seed": {HUGE}}}', f'{{"prompt": "a", "guidance": {"9" * 400}}}',
        '{"prompt": "a", "height": 99999984}', '{"prompt": "a", "width": 0}',
        '{"prompt": "a", "tile": 1000000000000}', '{"prompt": "a", "steps": null, "seed": null}',
        '{"prompt": "a", "guidance_interval": [0, 1, 2]}', '{"prompt": "a", "\\udfff": 1}',
        '{"prompt": "a", "size": "65"}', '{"prompt": "a", "scheduler": "ddpm"}', '{"prompt": "  "}',
        '{"prompt": "a", "version": 99}', '"a"', "nul", '{"prompt": ["a"]}',
    ],
    ids=lambda line: line[:40],
)  # fmt: skip
def test_a_line_that_cannot_be_drawn_is_named(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    Path("p.jsonl").write_text('{"prompt": "first"}\n\n' + line)
    code, said = outcome(capsys, prompts=Path("p.jsonl"))
    assert code == 2 and said.startswith("pixart.generate: p.jsonl, line 3: "), said
    assert len(said) < 1000 or HUGE[:200] in said
    assert not os.path.exists("out")


def drawn_png(stub: StubPipeline) -> bytes:
    assert main(["a cat", "--output", "x.png", "--quiet"]) == 0
    return Path("x.png").read_bytes()


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def test_damaged_pictures_are_drawn_or_named(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes changed, cut and put in: as they lie, and with the checksum of their chunk set right."""
    whole, rng, codes = drawn_png(stub), random.Random(5), set()
    head = 8 + 25
    bomb = chunk(b"zTXt", b"pixart\0\0" + zlib.compress(b"[" * 70_000_000, 1))
    mutants = [
        whole[:20], whole[:head] + bomb + whole[head:], whole[:head] + chunk(b"IHDR", b"x") + whole[head:],
        whole[:head] + chunk(b"iTXt", b"pixart\0\1\0\0\0not deflated") + whole[head:],
        whole[:8] + chunk(b"IHDR", b"abc") + whole[head:],
        whole[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)) + whole[head:],
    ]  # fmt: skip
    for _ in range(60):
        content = bytearray(whole)
        place = rng.randrange(len(content))
        match rng.randrange(3):
            case 0:
                content[place] = rng.randrange(256)
            case 1:
                del content[place : place + rng.randrange(1, 40)]
            case _:
                content[place:place] = rng.randbytes(rng.randrange(1, 9))
        mutants.append(bytes(content))
    for content in mutants:
        Path("m.png").write_bytes(content)
        code, said = outcome(capsys, from_image=Path("m.png"), overwrite=True)
        codes.add(code)
        assert code == 0 or (code == 2 and said.startswith("pixart.generate: m.png: ")), said
    assert codes == {0, 2}


def test_whatever_a_picture_says_it_is_drawn_or_named(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn_png(stub)
    ours = json.loads(Image.open("x.png").info[KEY])
    texts = [DEEP, HUGE, "\x00", json.dumps(ours)[:-1], json.dumps(ours).replace("20", HUGE)]
    places = [(part, name) for part in ("request", "model", "asked") for name in ours[part]]
    rng = random.Random(5)
    for part, name in [*places, *((None, name) for name in ours)]:
        for value in rng.sample(VALUES, 3):
            one = json.loads(json.dumps(ours))
            (one if part is None else one[part])[name] = value
            texts.append(json.dumps(one))
    codes = set()
    for text in texts:
        info = PngInfo()
        info.add_itxt(KEY, text)
        Image.new("RGB", (8, 8)).save("m.png", pnginfo=info)
        code, said = outcome(capsys, from_image=Path("m.png"), overwrite=True)
        codes.add(code)
        assert code == 0 or (code == 2 and said.startswith("pixart.generate: m.png: ")), (
            text,
            said,
        )
    assert codes == {0, 2}


def test_what_the_model_refuses_of_a_picture_names_the_picture(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        drawn_png(opened(patch))
    one = json.loads(Image.open("x.png").info[KEY])
    for name, value in (
        ("model", "no/such/folder/here"),
        ("model", "x" * 5000),
        ("kv_compress", "all"),
        ("device", "gpu"),
    ):
        info = PngInfo()
        info.add_itxt(KEY, json.dumps(one | {"asked": {}, "model": one["model"] | {name: value}}))
        Image.new("RGB", (8, 8)).save("m.png", pnginfo=info)
        code, said = outcome(capsys, from_image=Path("m.png"))
        assert code == 2 and said.startswith("pixart.generate: m.png: "), said


def test_a_file_of_prompts_without_an_end_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pixart.generation.prompts.MAX_BYTES", 10_000)
    code, said = outcome(capsys, prompts=Path("/dev/zero"))
    assert code == 2 and "/dev/zero: must be at most 10,000 bytes" in said


@pytest.mark.parametrize(
    "error, code",
    [(ValueError("out/x.png: cannot be written"), 2), (RuntimeError("no memory"), 1), (KeyboardInterrupt(), 130)],
)  # fmt: skip
def test_json_prints_what_is_finished_however_a_run_ends(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    stub.stop[1] = error
    assert main(["a cat", "a dog", "--json"]) == code
    result = json.loads(capsys.readouterr().out)
    assert [image["prompt"] for image in result["images"]] == ["a cat"] and result["error"]
    assert result["images"][0]["settings"]["steps"] == 20


def test_json_prints_what_is_finished_before_a_fault_of_ours(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.stop[1] = TypeError("a fault")
    with pytest.raises(TypeError):
        main(["a cat", "a dog", "--json"])
    assert len(json.loads(capsys.readouterr().out)["images"]) == 1


def test_quiet_is_quiet_whatever_libraries_do(capfd: pytest.CaptureFixture[str]) -> None:
    """As torchao does: it warns as it is imported, by handlers of its own, and its libraries in C print."""
    with Console(quiet=True).with_libraries():
        logging.disable(logging.NOTSET)
        logging.getLogger("torchao").critical("cannot load its extensions")
        handler = logging.StreamHandler()
        logging.getLogger("own").addHandler(handler)
        logging.getLogger("own").error("has a handler of its own")
        print("printed", file=sys.stderr)
        os.write(2, b"written by a library in C\n")
        os.write(process.ENDING.error_output, b"cancelled\n")
    logging.getLogger("own").removeHandler(handler)
    assert capfd.readouterr().err == "cancelled\n", "what ends the process is said all the same"
    print("afterwards", file=sys.stderr)
    assert capfd.readouterr().err == "afterwards\n"


def test_unknown_words_of_a_negative_prompt_are_named(
    stub: StubPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["a red circle", "--negative", "a blue 犬, fog"]) == 0
    assert "the embedded model does not know: 犬, fog. It knows" in capsys.readouterr().err
    [job], _ = plan(Options(prompt=("a",), negative="犬"))
    assert job.request.negative == "犬" and not re.search("犬", str(job.path))
