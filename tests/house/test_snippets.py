"""Every example of the guides is run, in a copy of the checkout and an empty home.

A block is one of these, so that none escapes:

    sh      run by bash; the models on the hub are tiny ones of the same layout in folders of their names
    python  the blocks of a document are one program; or a file, if the first line names it: # path/x.py
    yaml    the file that the first line names
    diff    lines to add to, or take out of, the file that the first line names; @@ between two places
    text    what a command prints
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pictures
import pytest
from documents import GUIDES, ROOT, Example, examples
from published import build_sigma
from tiny_checkpoints import official, save_official

from pixart.config import PixArtConfig

LANGUAGES = {"sh", "python", "yaml", "diff", "text"}
SLOW = set(GUIDES) - {"README.md", "kernels/README.md"}
HUB_ID = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
OFFICIAL = "PixArt-alpha/PixArt-Sigma/PixArt-Sigma-XL-2-2K-MS.pth"

# What would take hours, or a model of the real size, is made small; everything else runs as it is written.
SMALLER = {
    "--steps 2000": "--steps 2 --resolution 256 --batch.images 2",
    "step-00002000": "step-00000002",
    "--lora.rank 16": "--lora.rank 2 --steps 2 --resolution 256 --batch.images 2",
    "step-00001000": "step-00000002",
    "step-00000500": "step-00000002",
    "--steps 300 --output runs/four": "--steps 2 --output runs/four",
    "--resolution 1024": "--resolution 256",
    "--num-images 200": "--num-images 2",
    "--count 300": "--count 1 --steps 4",
    "run shapes --model shapes": "run shapes --model shapes --count 10",
}

# Commands that are not run as they are: what stands in for them, and why.
STAND_INS = {
    "python": '[[ $* == *torch.distributed.run* ]] && exec torchrun "$@"; exec "$PYTHON" "$@"',
    "pixart": 'exec "$PYTHON" -m pixart "$@"',
    "pytest": 'exec "$PYTHON" -m pytest -p no:cacheprovider "$@"',
    # It would set up an environment, or take as long as all other tests: the target is there.
    "make": 'exec "$MAKE" -n "$@"',
    # It would download torch: the package and its extras are there.
    "pip": 'exec "$PYTHON" "$STAND_INS/install.py" "$@"',
    # Slurm is not here: the script runs once, as on one machine.
    "sbatch": 'while [[ $1 == --* ]]; do shift 2; done; exec bash "$@"',
    # They need several GPUs, and launch.sh has tests of its own: options are read.
    "torchrun": 'exec "$PYTHON" "$STAND_INS/torchrun.py" "$@"',
}
PROGRAMS = {
    "install.py": """
import re, sys
from pathlib import Path
assert sys.argv[1] == "install", sys.argv
for word in sys.argv[2:]:
    if word == "-e":
        continue
    folder, extras = re.fullmatch(r"(\\.[\\w./]*)(?:\\[([\\w,]+)\\])?", word).groups()
    assert (Path(folder) / "pyproject.toml").is_file(), word
    known = re.findall(r'^    "(\\w+)": ', Path("setup.py").read_text(), re.MULTILINE)
    assert set((extras or known[0]).split(",")) <= set(known), (word, known)
""",
    "torchrun.py": """
import sys
from pixart.generation.options import parse_options
from pixart.train import read_command
words = sys.argv[sys.argv.index("--") + 1 :]
if words[0] == "pixart.generate":
    print(f"{len(parse_options('generate', words[1:]).prompt)} prompts")
    sys.exit()
assert words[0] == "pixart.train", words
options, stages = read_command(words[1:])
print(f"{options.recipe}: {len(stages)} stages")
""",
}


def test_every_block_is_an_example_that_is_run_or_what_one_prints() -> None:
    for document in GUIDES:
        for example in examples(document):
            assert example.language in LANGUAGES, example.place
            if example.language == "text":
                commands = r"^\s*(\$|pixart|python|pytest|pip|make|git|from|import) "
                assert not re.search(commands, example.text, re.MULTILINE), example.place


def test_what_is_made_smaller_stands_in_a_guide() -> None:
    text = "\n".join(example.text for document in GUIDES for example in examples(document))
    assert not [written for written in SMALLER if written not in text]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has, or gets from the hub: under the same names, with 28 blocks one head wide."""
    folder = tmp_path_factory.mktemp("models")
    build_sigma(folder / HUB_ID, sample_size=32, num_layers=28, heads=1)
    (folder / OFFICIAL).parent.mkdir()
    config = PixArtConfig(
        input_size=256, hidden_size=72, depth=28, num_heads=1, caption_channels=32,
        model_max_length=300, pe_interpolation=4.0,
    )  # fmt: skip
    save_official(folder / OFFICIAL, official(config))
    for name in ("pictures", "my-dog", "lines"):
        pictures.folder(folder / name, height=300, width=400)
    return folder


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """The chosen documents, as many at a time as there are cores: each has a copy of its own."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    chosen = [
        item.callspec.params["document"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.originalname == test_the_examples_run.__name__
        and not item.get_closest_marker("skip")
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        places = {name: tmp_path_factory.mktemp("guide") for name in chosen}
        yield {name: pool.submit(_run_all, name, place, models) for name, place in places.items()}


@pytest.mark.parametrize(
    "document",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in GUIDES],
)
def test_the_examples_run(document: str, runs: dict[str, Future[None]]) -> None:
    runs[document].result()


def _run_all(document: str, place: Path, models: Path) -> None:
    checkout = _copy(place / "checkout", models)
    environment = _environment(place, checkout)
    found = [example for example in examples(document) if example.language != "text"]
    for example in found:
        if example.language == "sh":
            command = ["bash", "-euo", "pipefail", "-c", _smaller(example.text)]
            _run(command, example, checkout, environment)
        elif example.language == "diff":
            _change(checkout, example)
        elif example.file:
            _write(checkout, example)
        else:
            assert example.language == "python", f"{example.place}: the first line names no file"
    program = [one for one in found if one.language == "python" and not one.file]
    if program:
        (checkout / "examples.py").write_text(_program(document, program), encoding="utf-8")
        _run([sys.executable, "examples.py"], program[0], checkout, environment)


def _copy(checkout: Path, models: Path) -> Path:
    """The working tree, with the models beside it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    shutil.copytree(models, checkout)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    activate = checkout / ".venv" / "bin" / "activate"  # of `make demo`; ours is active already
    activate.parent.mkdir(parents=True)
    activate.touch()
    return checkout


def _environment(place: Path, checkout: Path) -> dict[str, str]:
    """Nothing of the user's: a home of its own, no network, no GPU."""
    stand_ins = place / "stand-ins"
    stand_ins.mkdir()
    for name, body in STAND_INS.items():
        (stand_ins / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (stand_ins / name).chmod(0o755)
    for name, body in PROGRAMS.items():
        (stand_ins / name).write_text(body)
    dropped = ("PYTEST_", "SLURM_", "TRITON_", "XDG_", "HF_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {
        "HOME": str(place / "home"),
        "PATH": os.pathsep.join([str(stand_ins), str(Path(sys.executable).parent), kept["PATH"]]),
        "PYTHON": sys.executable,
        "MAKE": shutil.which("make") or "make",
        "STAND_INS": str(stand_ins),
        "PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "kernels")]),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # threads of models this small wait for each other
    }


def _run(command: list[str], example: Example, checkout: Path, environment: dict[str, str]) -> None:
    with subprocess.Popen(
        command, cwd=checkout, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, errors = process.communicate(timeout=600)
        finally:  # what an example that failed left in the background
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{example.place}\n{out[-2000:]}{errors[-4000:]}"


def _smaller(text: str) -> str:
    for written, run in SMALLER.items():
        text = text.replace(written, run)
    return text


def _program(document: str, blocks: list[Example]) -> str:
    """The blocks where they stand in the document, so that a traceback has its line numbers."""
    lines: list[str] = []
    for block in blocks:
        lines += [""] * (block.line - len(lines)) + _smaller(block.text).splitlines()
    return "\n".join(lines) + "\n"


def _write(checkout: Path, example: Example) -> None:
    path = checkout / str(example.file)
    assert not path.exists(), f"{example.place}: {example.file} is there already"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(example.text.partition("\n")[2], encoding="utf-8")


def _change(checkout: Path, example: Example) -> None:
    """Lines with a minus or nothing before them stand in the file once; those with a plus replace them."""
    head, _, body = example.text.partition("\n")
    path = checkout / head.removeprefix("--- ")
    text = path.read_text(encoding="utf-8")
    for hunk in body.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] or "\n" for line in lines if line[:1] != "+")
        after = "".join(line[1:] or "\n" for line in lines if line[:1] != "-")
        found = text.count(before)
        assert found == 1, f"{example.place}: {path.name} has these lines {found} times\n{before}"
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")
