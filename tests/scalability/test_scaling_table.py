"""What the scalability paper's denoisers are made of: counted, and beside what it printed."""

import json
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pixart.cost import forward_flops
from pixart.scalability import measuring, one_pass
from pixart.scalability.counting import count, flops_by_module
from pixart.scalability.options import Table
from pixart.scalability.rows import ALPHA, PAPER_SIZE, ROWS, Row, choose
from pixart.scalability.table import deviations, table
from pixart.scalability.unets import UNETS, UNet, arguments, unet
from pixart.scaling import main
from pixart.variants import VARIANTS

WITH_PAPER = [row for row in ROWS.values() if row.paper is not None]
SMALL = 1_000_000_000  # parameters of a row that is run with weights
QUICK = ("SDXL-C128", "IF-XL-C512", ALPHA, "pixart-h1024-d28")


def _is_quick(row: Row) -> bool:
    return not row.is_unet or row.name in QUICK


def _marked(rows: list[Row]) -> list[Any]:
    """Building the larger UNets, even without memory, takes seconds each."""
    return [
        pytest.param(row, id=row.name, marks=() if _is_quick(row) else pytest.mark.slow)
        for row in rows
    ]


def test_the_paper_has_sixteen_unets_and_five_transformers() -> None:
    assert len(UNETS) == sum(row.is_unet for row in WITH_PAPER) == 16
    transformers = [row.name for row in WITH_PAPER if not row.is_unet]
    assert (
        len(transformers) == 5 + 1
    )  # PixArt-α stands there twice: with its text, and with the paper's


@pytest.mark.parametrize("row", _marked(WITH_PAPER))
def test_rows_are_within_the_papers_rounding(row: Row) -> None:
    """The paper prints two decimals of parameters, whole GMACs, and 35 GMACs where 34.9 are counted."""
    found = row.count(PAPER_SIZE)
    off = deviations(row, found, PAPER_SIZE)
    assert row.paper is not None and off["parameters"] is not None
    assert abs(off["parameters"]) < 0.01
    if row.name == ALPHA:
        assert off["macs"] is None
    else:
        assert off["macs"] is not None and abs(off["macs"]) < 0.007
    if row.paper.inside is not None and row.name != "TD4_8":
        assert abs(found.inside / 1e9 - row.paper.inside) < 1
    assert found.inside <= found.layers


def test_alpha_is_counted_with_its_own_text_too() -> None:
    """120 tokens of 4,096 channels instead of 77: 28 blocks' keys and values, and two layers before."""
    own, printed = (ROWS[name].count(PAPER_SIZE) for name in (ALPHA, f"{ALPHA}-77"))
    more = (120 - 77) * (28 * 2 * 1152**2 + 4096 * 1152 + 1152**2)
    assert own.layers - printed.layers == more
    assert own.layers == pytest.approx(142.8e9, rel=1e-3)
    assert ROWS[ALPHA].note


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_follow_their_formula(name: str) -> None:
    """Per block 14 h² of each image token and 2 h² of each of text; the ends are less than 1 %."""
    config, found = VARIANTS[name], ROWS[name].count(PAPER_SIZE)
    width, tokens = config.hidden_size, 256
    blocks = config.depth * (14 * width**2 * tokens + 2 * width**2 * config.model_max_length)
    assert found.inside == blocks
    assert blocks < found.layers < 1.01 * blocks
    attention = config.depth * 2 * tokens * (tokens + config.model_max_length) * width
    assert found.attention == attention
    assert 2 * (found.layers + found.attention) == forward_flops(config, tokens)
    assert config.head_dim in (64, 72, 96)


def test_the_caption_embedding_is_two_layers_of_the_text() -> None:
    without, with_it = (ROWS[f"pixart-h1024-d28{end}"].count(256) for end in ("", "-mlp"))
    assert with_it.parameters - without.parameters == 2 * (1024**2 + 1024)
    assert with_it.layers - without.layers == 2 * 77 * 1024**2
    assert without.parameters == pytest.approx(0.478e9, rel=1e-3)


_ATTEND = F.scaled_dot_product_attention


class Independent(TorchFunctionMode):
    """Counts in the functions that modules call, where the library's counter looks at operators."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = self.attention = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is F.linear:
            self.layers += result.numel() * args[0].shape[-1]
        elif function is F.conv2d:
            self.layers += result.numel() * args[1][0].numel()
        return result

    def attend(self, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Tensor:
        """In the place of F.scaled_dot_product_attention, which no mode sees inside an operator of ours."""
        self.attention += 2 * q.numel() * k.shape[-2]
        return _ATTEND(q, k, *rest, **options)


def _independently(row: Row, module: nn.Module, size: int) -> tuple[int, int]:
    mode = Independent()
    with torch.enable_grad(), mode, mock.patch.object(F, _ATTEND.__name__, mode.attend):
        row.forward(module, size)
    return mode.layers, mode.attention


NARROW = {
    "SD2": UNet("SD2", 64, (1, 2, 2, 2), (1, 1, 1, 0), residual_blocks=1),
    "SDXL": UNet("SDXL", 64, (1, 2, 4), (0, 1, 2), residual_blocks=1),
    "IF": UNet("IF", 64, (1, 2, 3, 4), (1, 1, 1, 0), residual_blocks=1),
}


@pytest.mark.parametrize("family", NARROW)
def test_a_narrow_unet_with_weights_is_counted_as_one_without(family: str) -> None:
    """Each family, by the same counter and by another."""
    row, found, modules = ROWS["TD2"], [], []
    for device in ("meta", "cpu"):
        with torch.device(device):
            modules.append(UNet2DConditionModel(**arguments(NARROW[family])).eval())
        found.append(count(modules[-1], lambda module: row.forward(module, 64), ["mid_block"]))
    assert found[0] == found[1] and found[0].inside > 0
    assert _independently(row, modules[1], 64) == (found[0].layers, found[0].attention)


OFTEN = ("SD2-C320", "TD2", "pixart-h1024-d28")  # one of each kind; the others take minutes


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[] if name in OFTEN else pytest.mark.exhaustive)
        for name, row in ROWS.items()
    ],
    ids=list(ROWS),
)
def test_every_smaller_row_runs_as_it_is_counted(row: Row) -> None:
    if sum(weight.numel() for weight in row.build().parameters()) > SMALL:
        pytest.skip("above a billion parameters")
    _check_real(row, PAPER_SIZE)


def _check_real(row: Row, size: int) -> None:
    """On the CPU: parameters, the same counter on numbers, and another way of counting."""
    expected = row.count(size)
    module = one_pass.with_weights(row, torch.device("cpu"), torch.float32)
    assert sum(weight.numel() for weight in module.parameters()) == expected.parameters
    found = count(module, lambda module: row.forward(module, size))
    total = expected.layers + expected.attention
    assert found.layers + found.attention == total
    assert _independently(row, module, size) == (expected.layers, expected.attention)


def test_the_counter_finds_what_cost_says_of_a_transformer() -> None:
    row = ROWS["pixart-h1024-d28"]
    found = flops_by_module(row.build(), lambda module: row.forward(module, 128))
    assert found[""] == 2 * row.count(128).layers  # on the meta device it knows no operator of ours


def test_a_larger_picture_has_more_of_everything_but_weights() -> None:
    small, large = (ROWS["pixart-h1152-d28"].count(size) for size in (256, 512))
    assert large.parameters == small.parameters
    assert 3.5 < large.layers / small.layers < 4 < large.attention / small.attention < 16


@pytest.mark.parametrize(
    ("only", "found"),
    [
        (("TD4",), {"TD4"}),  # a name, though others begin so
        (("td4_",), {"TD4_4", "TD4_8", "TD4_12"}),
        (("SD2", "SDXL-C128"), {"SD2-C320", "SD2-C512", "SDXL-C128"}),
        ((), set(ROWS)),
    ],
)
def test_rows_are_chosen_by_names_and_their_beginnings(
    only: tuple[str, ...], found: set[str]
) -> None:
    assert {row.name for row in choose(only)} == found


def _json(*arguments: str, capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(["table", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_whole_counts_and_the_papers_figures(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = _json("--only", "pixart-h1536-d28", capsys=capsys)["rows"][:1]
    assert row["paper"] == {
        "parameters_1e9": 1.08, "macs_1e9": 247, "macs_in_transformer_blocks_1e9": None,
    }  # fmt: skip
    assert isinstance(row["macs"], int) and row["macs_with_attention"] > row["macs"]
    assert abs(row["deviation"]["macs"]) < 0.007


def test_at_another_size_no_gmacs_of_the_paper_stand_beside(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (row,) = _json("--only", "pixart-h1024-d56", "--size", "512", capsys=capsys)["rows"][:1]
    assert row["name"] == "pixart-h1024-d56"
    assert row["paper"]["macs_1e9"] is None and row["deviation"]["macs"] is None
    assert row["paper"]["parameters_1e9"] == 0.95


def test_the_text_says_what_is_counted_and_what_is_no_deviation() -> None:
    text = table(Table(only=("pixart-h1152-d28", ALPHA)))
    assert "QKᵀ" in text and "120 tokens" in text and "+0.1 %" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "SD9"], "only must name rows or begin their names, got 'SD9'"),
        (["--only", ""], "only must name rows"),
        (["--size", "100"], "size must be a multiple of 64 from 64 to 8192, got 100"),
        (["--size", "-64"], "size must be"),
        (["--size", "1000000"], "size must be"),
        (["--batch", "1"], "batch must be left out without --measure, got 1"),
        (["--dtype", "bf16"], "dtype must be left out without --measure, got bf16"),
        (["--device", "cpu"], "device must be left out without --measure, got cpu"),
        (["--measure", "--batch", "0"], "batch must be from 1 to 1024, got 0"),
        (["--measure", "--device", "tpu"], "device must be cpu, cuda, cuda:N or mps, got 'tpu'"),
        (["--measure", "--dtype", "fp8"], "--dtype must be one of"),
    ],
)
def test_nonsense_is_refused_in_a_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", "--only", "pixart-h1024-d28", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_ctrl_c_speaks_of_no_study(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pixart.scalability.table.choose", interrupted)
    assert main(["table"]) == 130
    assert capsys.readouterr().err == "pixart.scaling: cancelled\n"


def test_a_unet_of_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match="name must be one of SD2-C320.*got 'SDXL'"):
        unet("SDXL")


def test_arguments_are_those_of_the_family() -> None:
    assert arguments(UNETS["TD4_8"])["transformer_layers_per_block"] == [1, 4, 8]
    assert arguments(UNETS["SD2-C512"])["block_out_channels"] == (512, 1024, 2048, 2048)


# Measuring.


def test_large_rows_are_left_out_on_a_cpu_with_the_reason() -> None:
    found = measuring.measure("SDXL-C320", 2_391_824_644, torch.device("cpu"), 256, "fp32", 1)
    assert found.milliseconds is None
    assert found.left_out == "2.39 billion parameters, more than 1 billion on a CPU"


def test_rows_without_room_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "free_memory", lambda device: 2**30)
    found = measuring.measure("SD2-C320", 865_910_724, torch.device("cpu"), 256, "fp32", 1)
    assert found.left_out == "needs 4.0 GiB, 1.0 GiB are free"


@pytest.mark.slow
def test_a_pass_is_measured_in_a_process_of_its_own() -> None:
    """The smallest sizes: what it finds is a time, and at least the weights in memory."""
    found = measuring.measure("pixart-h1024-d28", 478_000_000, torch.device("cpu"), 64, "bf16", 1)
    assert found.milliseconds is not None and found.milliseconds > 0 and found.repeats >= 3
    assert found.peak_bytes is None or found.peak_bytes > 2 * 478_000_000


def test_a_process_that_fails_is_an_error_of_one_line() -> None:
    with pytest.raises(RuntimeError, match="one_pass failed with exit code 1: KeyError: 'none'"):
        measuring.ask(measuring.WORKER, {"row": "none", "device": "cpu", "dtype": "fp32"})


def test_text_tells_speed_memory_and_what_was_left_out() -> None:
    where = measuring.Machine("cpu", "A processor", 2, 1, "2.13.0")
    passes = [
        measuring.Pass("TD4", "fp32", 8, 2000.0, 3, 3 * 2**30),
        measuring.Pass("TD12", "fp32", 1, left_out="too large"),
    ]
    lines = measuring.passes_text(passes, {"TD4": 123.0, "TD12": 223.0}, where)
    assert "A processor, 2 cores, 1 threads, PyTorch 2.13.0" in lines[0]
    assert lines[-2].split() == ["TD4", "fp32", "8", "984", "2,000.0", "984", "3.00"]
    assert lines[-1].endswith("left out: too large")
