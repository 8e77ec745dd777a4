"""`python -m pixart.publish`: what it writes, what it refuses, and what it would do on the hub."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from evaluated import build, results_of
from evaluated import write as write_results
from published import build_sigma
from tiny_checkpoints import edit_json

from pixart import publish
from pixart.pipeline.pictures import read_metadata
from pixart.pipeline.text_to_image import Pipeline
from pixart.publishing import writing
from pixart.publishing.source import find_source, license_in

TOKEN = "hf_secretsecret"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    return tmp_path


class Hub:
    """In the place of huggingface_hub.HfApi. there: whether the repository is, and is private."""

    def __init__(self, there: bool | None = None, fault: str = "") -> None:
        self.there, self.fault, self.calls = there, fault, list[tuple[str, Any]]()

    def __call__(self, token: str) -> "Hub":
        assert token == TOKEN
        return self

    def repo_info(self, name: str, repo_type: str) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        if self.there is None:
            raise RepositoryNotFoundError("404", response=_Response())  # type: ignore[arg-type]
        return SimpleNamespace(private=self.there)

    def create_repo(self, name: str, repo_type: str, private: bool) -> None:
        self.calls.append(("create", private))

    def upload_folder(self, **given: Any) -> None:
        if self.fault:
            raise OSError(self.fault)
        names = {
            p.relative_to(given["folder_path"]).as_posix() for p in given["folder_path"].rglob("*")
        }
        self.calls.append((given["repo_id"], names))


class _Response:
    headers: dict[str, str] = {}
    request = None
    status_code = 404


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", found)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    return found


def run(*words: str) -> int:
    return publish.main([*words, "--no-previews"])


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """The one line on standard error."""
    capsys.readouterr()
    assert publish.main(list(words)) == code
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_a_folder_is_written_with_a_card_and_previews(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--prompt", "a small blue star on gray", "--seed", "5")
    assert publish.main(["mine", "--model", "shapes", *words]) == 0
    listed = capsys.readouterr().out
    for name in ("README.md", "pipeline.py", "transformer/pixart_kv.py", "previews/0.png"):
        assert re.search(rf"^ *[\d,]+  {re.escape(name)}$", listed, re.MULTILINE)
    text = (here / "mine" / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == "apache-2.0" and header["library_name"] == "diffusers"
    assert header["pipeline_tag"] == "text-to-image" and "base_model" not in header
    assert "merged 2×2 in blocks 3, 4, 5 (conv, with a LayerNorm)" in text
    assert "![a small blue star on gray](previews/0.png)" in text
    assert "Not verified" in text and "Not measured." in text
    request = read_metadata(here / "mine" / "previews" / "0.png").request
    assert (request.prompt, request.seed) == ("a small blue star on gray", 5)
    assert str(here) not in text
    index = json.loads((here / "mine" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "PixArtKVPipeline"] and index["guidance"] == 2


def test_a_dry_run_says_where_it_would_go_and_asks_nobody(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("me/mine", "--model", "shapes", "--private") == 0
    said = capsys.readouterr().out
    assert "nothing was uploaded" in said
    assert "private repository https://huggingface.co/me/mine" in said
    assert hub.calls == [] and Path("published/mine/model_index.json").is_file()


def test_push_uploads_what_was_written(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("me/mine", "--model", "shapes", "--folder", "out", "--private")
    assert run(*words) == 0
    assert run(*words, "--push") == 0  # over what the dry run wrote
    [(made, private), (name, files)] = hub.calls
    assert (made, private, name) == ("create", True, "me/mine")
    assert {"README.md", "pipeline.py", "transformer/pixart_kv.py"} <= files
    said = capsys.readouterr()
    assert "uploaded to https://huggingface.co/me/mine" in said.out
    assert TOKEN not in said.out + said.err


def test_what_the_hub_refuses_is_one_line_without_the_token(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("me/mine", "--model", "shapes", "--no-previews", "--push")
    hub.there, hub.fault = False, f"403 Forbidden\nfor {TOKEN}"
    line = refused(capsys, 1, *words)
    assert "me/mine: the hub did not take it (403 Forbidden for ***)" in line
    line = refused(capsys, 2, *words, "--private")
    assert "--private must be left out for me/mine, which is there and public" in line
    assert hub.calls == []


def test_push_without_a_token_is_refused_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, 2, "me/mine", "--model", "shapes", "--push")
    assert "set HF_TOKEN" in line and not list(here.iterdir())


def test_bad_input_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "full").mkdir()
    (here / "full" / "notes.txt").write_text("mine")
    (here / "file").write_text("mine")
    shapes = ("--model", "shapes")
    for words, said in (
        (("out", *shapes, "--push"), "--push must be given with OWNER/NAME"),
        (("out", *shapes, "--private"), "--private must be given with OWNER/NAME"),
        (("out", *shapes, "--folder", "x"), "--folder must be left out"),
        (("full", *shapes), "full: holds something that was not published from here"),
        (("file", *shapes), "file: must be a folder"),
        (("out", "--model", "nothing-here"), "the licence of nothing-here"),
        (("out", *shapes, "--license", ""), "--license must be a name"),
        (("out", *shapes, "--results", "full"), "full: must be a folder of results"),
        (("out", *shapes, "--no-previews", "--prompt", "x"), "--prompt must be left out"),
        (("out", "--model", "nothing-here", "--license", "mit"), "no such file"),
        (("out", *shapes, "--token", "x"), "unknown option --token"),
        (("out",), "--model must be given"),
    ):
        assert said in refused(capsys, 2, *words), words
    assert {path.name for path in here.iterdir()} == {"full", "file"}


def test_a_licence_is_never_made_up(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = build_sigma(here / "mine", sample_size=16)
    line = refused(capsys, 2, "out", "--model", str(source), "--no-previews")
    assert "is not known here; give it with --license" in line
    line = refused(capsys, 2, "out", "--model", str(source), "--no-previews", "--base", "sigma-512")
    assert "the licence of PixArt-alpha/PixArt-Sigma-XL-2-512-MS" in line
    assert run("out", "--model", str(source), "--base", "sigma-1024") == 0
    header = yaml.safe_load((here / "out" / "README.md").read_text().split("---\n")[1])
    assert header["license"] == "openrail++"
    assert header["base_model"] == "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"


@pytest.mark.parametrize(
    "header, found",
    [
        ("---\nlicense: openrail++\ntags: [x]\n---\n", "openrail++"),
        ('---\ntags:\n- x\nlicense: "mit"\n---\ntext', "mit"),
        ("---\nlicense:\n- mit\n---\n", None),
        ("license: mit\n", None),
        ("---\nlicence: mit\n---\n", None),
    ],
)
def test_the_licence_of_a_card(header: str, found: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(header)
    assert license_in(tmp_path / "README.md") == found
    assert license_in(tmp_path / "absent.md") is None


def test_numbers_stand_with_their_command_and_are_of_this_model(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build(here / "ev", count=6)
    results = results_of(folder)
    words = ("out", "--model", "shapes", "--results", "ev", "--no-previews")
    for weights, said in ((None, "must say the weights"), ({"transformer": "0"}, "other weights")):
        write_results(folder, results | {"weights": weights})
        assert said in refused(capsys, 2, *words)
    own = Pipeline.from_pretrained("shapes", device="cpu", cache_dir=None).weights
    write_results(folder, results | {"weights": own})
    assert publish.main(list(words)) == 0
    text = (here / "out" / "README.md").read_text()
    value = results["metrics"]["fid-clean"]["values"]["fid-clean"]["value"]
    assert re.search(rf"\| fid-clean \| {value:.1f} \[", text) and "pixart.evaluate" in text


def test_what_fails_midway_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> str:
        raise OSError("the disk is full")

    assert run("out", "--model", "shapes") == 0
    before = (here / "out" / "README.md").read_text()
    monkeypatch.setattr(writing, "model_card", fail)
    words = ("--model", "shapes", "--no-previews")
    assert "the disk is full" in refused(capsys, 1, "out", *words)
    assert "the disk is full" in refused(capsys, 1, "new", *words)
    assert [path.name for path in here.iterdir()] == ["out"]
    assert (here / "out" / "README.md").read_text() == before


def test_a_state_of_training_tells_how_it_was_made(here: Path) -> None:
    state = build_sigma(here / "runs" / "kv" / "convert" / "step-00000020", sample_size=16)
    fields = {
        "start": "sigma-1024", "resolution": 128, "kv_compress": "1:2", "optimizer.name": "came",
        "data.source": "/home/me/secret/cats", "batch.images": 4, "validation.prompts": ["a cat"],
    }  # fmt: skip
    begun = {"fields": fields, "data": {"data.source": "ab" * 32}}
    (state / "progress.json").write_text(
        json.dumps({"stage": "convert", "step": 20, "begun": begun})
    )
    assert run("out", "--model", str(state)) == 0
    text = (here / "out" / "README.md").read_text()
    assert "| base | PixArt-alpha/PixArt-Sigma-XL-2-1024-MS |" in text
    assert "| stage, step | convert, 20 |" in text and "| batch.images | 4 |" in text
    assert f"| data | cats, sha256 {'ab' * 32} |" in text and "/home/me" not in text
    assert "license: openrail++" in text
    source = find_source(str(state))
    assert source.base is not None and source.step == 20
    edit_json(state / "progress.json", begun={"fields": fields | {"start": "previous"}})
    assert find_source(str(state)).base is None


def test_a_model_that_the_code_cannot_draw_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = build_sigma(here / "mine", sample_size=16, heads=1, d_model=72)
    from safetensors.torch import load_file, save_file

    [weights] = (source / "transformer").glob("*.safetensors")
    kept = {n: t for n, t in load_file(weights).items() if "caption_projection" not in n}
    save_file(kept, weights, {"format": "pt"})
    edit_json(source / "transformer" / "config.json", caption_channels=None)
    line = refused(capsys, 2, "out", "--model", str(source), "--license", "mit")
    assert "caption_embedding must be true to be published, got false" in line
    assert not (here / "out").exists()
