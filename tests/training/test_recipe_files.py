"""Recipes as files: what they become, and the errors about those that are wrong."""

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pixart.train import Options
from pixart.train import main as train
from pixart.training.problems import Problems
from pixart.training.recipe import ALIASES, load_recipe, shipped
from pixart.training.stage import OPEN

GOLDEN = Path(__file__).parent.parent / "golden" / "recipes"


def test_the_help_names_every_shipped_recipe() -> None:
    source = " ".join(inspect.getsource(Options).split())
    assert f"A shipped recipe ({', '.join(shipped())}) or a YAML file" in source


@pytest.mark.parametrize("name", sorted({*shipped()} - {*ALIASES}))
def test_a_shipped_recipe_is_read_as_ever(name: str) -> None:
    """golden/recipes: what the parser before this one made of them, which left no field open."""
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    stages = load_recipe(name)
    assert json.loads(json.dumps([asdict(stage.resolved()) for stage in stages])) == expected
    # What one leaves open, another value of its start or its data may fill.
    for stage, fields in zip(stages, expected, strict=True):
        written = {one: getattr(stage, one) for one in OPEN if getattr(stage, one) is not None}
        assert written.items() <= fields.items()


def problems(place: Path, text: str) -> list[str]:
    """The error about a recipe, without its name."""
    path = place / "r.yaml"
    path.write_text(text)
    with pytest.raises(Problems) as error:
        load_recipe(path)
    assert all(line.startswith(f"{path}: ") for line in error.value.lines)
    return [line.removeprefix(f"{path}: ") for line in error.value.lines]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("data: {sourcee: x}", "a.data.sourcee: unknown field; did you mean source"),
        (
            "learning_rate: 1",
            "a.learning_rate: unknown field; did you mean optimizer.learning_rate",
        ),
        ("optimizer: {frob: 1}", "a.optimizer.frob: unknown field; known are name, learning_rate"),
        ("steps: x", 'a.steps must be a whole number, got "x"'),
        ("steps: 3.0", "a.steps must be a whole number, got 3.0"),
        ("batch: {images: true}", "a.batch.images must be a whole number, got true"),
        ("ema: '0.9'", 'a.ema must be a number, got "0.9"'),
        ("aspect: 1", "a.aspect must be true or false, got 1"),
        ("start: 5", "a.start must be text; put it in quotes, got 5"),
        ("start: null", "a.start must be text; put it in quotes, got null"),
        ("precision: fp8", "a.precision must be one of 'fp32', 'bf16' or 'fp16', got \"fp8\""),
        ("batch: 5", "a.batch must be a mapping of fields, got 5"),
        ("size: null", "a.size must be a mapping of fields, got null"),
        ("optimizer: {betas: 0.9}", "a.optimizer.betas must be a list, got 0.9"),
        ("optimizer: {betas: [0.9, x, 1]}", 'a.optimizer.betas[1] must be a number, got "x"'),
        ("data: {captions: [a, 1]}", "a.data.captions must be a mapping of names to weights, got"),
        ("data: {captions: {p: much}}", 'a.data.captions.p must be a number, got "much"'),
        ("data: {captions: {no: 1}}", "a.data.captions.False: names must be text, got False"),
        ("batch: {images: 0}", "a.batch.images must be at least 1, got 0"),
        ("optimizer: {name: adam8}", "a.optimizer.name must be one of 'came', 'adamw', 'muon'"),
        ("timesteps: normal", "a.timesteps must be uniform or logit-normal:MEAN, got 'normal'"),
    ],
)
def test_what_is_wrong_is_named_with_stage_field_value_and_way_out(
    tmp_path: Path, fields: str, message: str
) -> None:
    (line, *more) = problems(tmp_path, f"stages:\n  - name: a\n    {fields}\n")
    assert line.startswith(message)
    assert not more or "False" in line


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    lines = problems(
        tmp_path,
        """
defaults: {steps: 0}
stages:
  - {name: a, ema: 2, aspect: 3, optimizer: {eps: 0, lr: 1}}
  - {name: b, batch: {images: 0, tokens: 0, accumulate: -1}, hours: .nan}
""",
    )
    assert {line.split()[0] for line in lines} == {
        *("a.steps", "a.ema", "a.aspect", "a.optimizer.eps", "a.optimizer.lr:"),
        *("b.steps", "b.batch.images", "b.batch.tokens", "b.batch.accumulate", "b.hours"),
    }


def test_numbers_and_texts_are_those_of_todays_yaml(tmp_path: Path) -> None:
    """YAML 1.1 would read 1e-4 as a text, 3:2 as 182, 2026-01-01 as a date and 010 as 8."""
    path = tmp_path / "r.yaml"
    path.write_text(
        "stages:\n  - name: 2026-01-01\n    kv_compress: 3:2\n    ema: 9.99E-1\n"
        "    optimizer: {learning_rate: 1e-4, weight_decay: 1, warmup_steps: 1_000}\n"
    )
    (stage,) = load_recipe(path)
    assert (stage.name, stage.kv_compress, stage.ema) == ("2026-01-01", "3:2", 0.999)
    settings = stage.optimizer
    assert (settings.learning_rate, settings.weight_decay, settings.warmup_steps) == (1e-4, 1, 1000)
    assert isinstance(settings.weight_decay, float)
    path.write_text("stages:\n  - name: a\n    steps: 010\n")
    with pytest.raises(Problems, match='a.steps must be a whole number, got "010"'):
        load_recipe(path)
    path.write_text("stages:\n  - name: a\n    hours: .inf\n    seed: .nan\n")
    with pytest.raises(Problems) as error:
        load_recipe(path)
    assert [line.removeprefix(f"{path}: ") for line in error.value.lines] == [
        "a.seed must be a whole number, got NaN",
        "a.hours must be a finite number, got inf",
    ]


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stages:\n  - name: a\n    steps: 1\n    steps: 2\n")
    with pytest.raises(ValueError, match="line 4: .*steps stands there twice"):
        load_recipe(path)


# The command line, which says the same fields.


def refused(capsys: Any, *arguments: str) -> list[str]:
    """Train's complaints, each of which is a line of its own."""
    assert train(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert not out and all(line.startswith("pixart.train: ") for line in err.splitlines())
    return [line.removeprefix("pixart.train: ") for line in err.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "RECIPE must be given: one of alpha, controlnet, dmd, kv-convert, lcm, lora, scalability, shapes, "
            "shapes-clip, shapes-control, shapes-kv, shapes-lcm, shapes-tdm, sigma, tdm",
        ),
        (["shapes", "--steps", "x"], "--steps must be a whole number, got x"),
        (["shapes", "--steps"], "--steps must be one value, got nothing"),
        (["shapes", "--steps", "1", "2"], "--steps must be one value, got 1 2"),
        (["shapes", "--aspect", "yes"], "--aspect must be an option without a value, got yes"),
        (["shapes", "--optimizer.eps", "0"], "optimizer.eps must be positive, got 0.0"),
        (["shapes", "--precision=fp8"], "--precision must be one of fp32, bf16, fp16, got fp8"),
        (
            ["shapes", "--data.captions", "a"],
            "--data.captions must be pairs of a name and a number",
        ),
        (["shapes", "--track", "mlflow"], "--track must be one of tensorboard, wandb, trackio"),
        (["shapes", "--no-steps"], "--no-steps: unknown option; did you mean --steps"),
        (["shapes", "--sourcee", "x"], "--sourcee: unknown option; "),
        (
            ["shapes", "--learning-rate", "1"],
            "unknown option; did you mean --optimizer.learning-rate",
        ),
        (["shapes", "more"], "no option takes 'more'"),
        (["shapes", "--name", "x"], "--name: unknown option; "),
        (["shapes", "--keep", "0"], "--keep must be at least 1, got 0"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    tmp_path: Path, monkeypatch: Any, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = refused(capsys, *arguments)
    assert message in line
    assert not list(tmp_path.iterdir())


def test_all_that_is_wrong_on_a_command_line_is_said_at_once(capsys: Any) -> None:
    lines = refused(capsys, "sigma", "--steps", "x", "--ema", "2", "--foo", "1", "--keep", "y")
    assert [line.split()[0] for line in lines] == ["--steps", "--foo:", "--keep", "ema"]


def test_the_command_line_says_every_kind_of_value() -> None:
    from pixart.train import read_command

    options, (stage,) = read_command(
        [
            *(
                "lora",
                "--no-aspect",
                "--micro_condition",
                "--data.source=a=b",
                "--max-length",
                "120",
            ),
            *("--optimizer.betas", "0.5", "0.25", "--optimizer.eps", "None", "--seed", "-3"),
            *(
                "--data.captions",
                "a",
                "1",
                "b",
                "2.5",
                "--lora.targets",
                "qkv",
                "--pe-interpolation",
            ),
            *("None", "--validation.prompts", "a cat", "-1 dogs", "--validation.every", "5"),
            *("--output", "here", "--track", "wandb", "trackio", "--quiet", "--stop-after", "3"),
        ]
    )
    assert (stage.aspect, stage.micro_condition, stage.data.source) == (False, True, "a=b")
    assert stage.optimizer.betas == (0.5, 0.25) and stage.optimizer.eps is None
    assert stage.data.captions == (("a", 1.0), ("b", 2.5)) and stage.lora.targets == ("qkv",)
    assert stage.validation.prompts == ("a cat", "-1 dogs") and stage.seed == -3
    assert (stage.max_length, stage.pe_interpolation, stage.lora.rank) == (120, None, 16)
    assert (options.output, options.track) == (Path("here"), ("wandb", "trackio"))
    assert options.quiet and options.stop_after == 3 and not options.dry_run


def test_weights_on_the_command_line_take_the_place_of_all_others() -> None:
    from pixart.train import read_command

    _, stages = read_command(["shapes", "--data.scenes", "group", "1"])
    assert {stage.data.scenes for stage in stages} == {(("group", 1.0),)}


def test_a_named_stage_alone_takes_what_the_command_line_says() -> None:
    from pixart.train import read_command

    _, stages = read_command(["shapes", "--stage=read", "--steps", "7"])
    expected = {stage.name: stage.steps for stage in load_recipe("shapes")} | {"read": 7}
    assert {stage.name: stage.steps for stage in stages} == expected


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "cancelled; what was saved is kept"),
        (RuntimeError("the device is gone"), 1, "the device is gone"),
        (MemoryError(), 1, "out of memory"),
        (OSError(28, "Full"), 1, "Full; make room there, or name another place"),
    ],
)
def test_however_a_run_ends_it_is_one_line_and_an_exit_code(
    tmp_path: Path, monkeypatch: Any, capsys: Any, error: BaseException, code: int, line: str
) -> None:
    """Outside the steps, during which Ctrl-C saves and stops."""
    from pixart.training import execute

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(execute, "train", fail)
    assert train(["shapes", "--output", str(tmp_path / "run"), "--device", "cpu"]) == code
    assert capsys.readouterr().err == f"pixart.train: {line}\n"
