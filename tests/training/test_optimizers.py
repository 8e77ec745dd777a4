import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixart.training.came import CAME
from pixart.training.ema import EMA
from pixart.training.optimizers import Muon, OptimizerSettings, build_optimizers, set_rate

ROOT = Path(__file__).parent.parent.parent


def reference_step(w: Tensor, g: Tensor, state: dict[str, Tensor], lr: float, decay: float) -> None:
    """The published algorithm for one tensor, written out."""
    b1, b2, b3 = 0.9, 0.999, 0.9999
    factored = g.dim() == 2

    def estimate(name: str, square: Tensor, beta: float) -> Tensor:
        if not factored:
            state[name] = beta * state.get(name, 0) + (1 - beta) * square
            return state[name].rsqrt()
        row, col = f"{name}_row", f"{name}_col"
        state[row] = beta * state.get(row, 0) + (1 - beta) * square.mean(1)
        state[col] = beta * state.get(col, 0) + (1 - beta) * square.mean(0)
        left = (state[row] / state[row].mean()).rsqrt()
        return left[:, None] * state[col].rsqrt()[None]

    update = estimate("sq", g.square() + 1e-30, b2) * g
    update = update / max(1.0, update.square().mean().sqrt().item())
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * update
    step = state["m"]
    if factored:
        step = estimate("res", (update - state["m"]).square() + 1e-16, b3) * state["m"]
    w.mul_(1 - lr * decay).sub_(lr * step)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (9, 1), (6,), (), (4, 3, 2, 2), (5, 3, 1, 1)])
def test_came_takes_the_published_steps(shape: tuple[int, ...], decay: float) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    expected = weight.detach().double().clone()
    matrix = expected.flatten(1) if expected.dim() > 2 and shape[2:] == (1, 1) else expected
    optimizer, state = CAME([weight], lr=1e-2, weight_decay=decay), {}  # type: ignore[var-annotated]
    for _ in range(20):
        weight.grad = torch.randn(shape)
        optimizer.step()
        reference_step(matrix, weight.grad.double().view(matrix.shape), state, 1e-2, decay)
    assert (weight.detach() - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_came_equals_the_published_implementation_on_matrices(decay: float) -> None:
    theirs = pytest.importorskip("came_pytorch").CAME
    torch.manual_seed(0)
    ours_, theirs_ = nn.Parameter(torch.randn(64, 48)), nn.Parameter(torch.empty(64, 48))
    theirs_.data.copy_(ours_.data)
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "weight_decay": decay}
    both = (CAME([ours_], **options), theirs([theirs_], **options))
    for _ in range(20):
        ours_.grad = torch.randn(64, 48)
        theirs_.grad = ours_.grad.clone()
        for optimizer in both:
            optimizer.step()
    assert (ours_ - theirs_).abs().max() < 1e-6


def test_came_keeps_a_row_and_a_column_of_a_matrix_and_all_of_a_convolution() -> None:
    model = nn.ModuleList([nn.Linear(8, 6, bias=False), nn.Conv2d(3, 4, 2, bias=False)])
    optimizer = CAME(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    linear, conv = (optimizer.state[p] for p in model.parameters())
    assert {name: tuple(t.shape) for name, t in linear.items() if name != "exp_avg"} == {
        "exp_avg_sq_row": (6,),
        "exp_avg_sq_col": (8,),
        "exp_avg_res_row": (6,),
        "exp_avg_res_col": (8,),
    }
    assert set(conv) == {"exp_avg", "exp_avg_sq"} and conv["exp_avg_sq"].shape == (4, 3, 2, 2)


def test_came_states_are_fp32_and_zero_gradients_move_nothing() -> None:
    weight = nn.Parameter(torch.randn(4, 4).bfloat16())
    before = weight.detach().clone()
    optimizer = CAME([weight], lr=1e-2)
    for _ in range(3):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert torch.equal(weight, before)
    assert all(tensor.dtype == torch.float32 for tensor in optimizer.state[weight].values())
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.isfinite().all() and not torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 17), (33,)])
def test_came_rounds_16_bit_weights_once_a_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The step in fp64 from the same rounded weights, rounded: bit for bit, but where fp32 lands on the
    other side of a midpoint (some 1 in 2 ** 13 of bf16, 1 in 2 ** 10 of fp16, and twice that here)."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape).to(dtype))
    optimizer, state, differ = CAME([weight], lr=1e-2, weight_decay=0.3), {}, 0  # type: ignore[var-annotated]
    for _ in range(30):
        expected = weight.detach().double()
        weight.grad = torch.randn(shape).to(dtype)
        optimizer.step()
        reference_step(expected, weight.grad.double(), state, 1e-2, 0.3)
        differ += int((weight.detach() != expected.to(dtype)).sum())
    assert differ <= 30 * weight.numel() / 2**9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_muon_rounds_16_bit_weights_once_a_step(dtype: torch.dtype) -> None:
    """Against the step of fp32 weights that hold the same numbers."""
    torch.manual_seed(0)
    narrow = nn.Parameter(torch.randn(64, 96).to(dtype))
    wide = nn.Parameter(narrow.detach().float())
    both = [Muon([weight], lr=1e-2, weight_decay=0.3) for weight in (narrow, wide)]
    for _ in range(4):
        with torch.no_grad():
            wide.copy_(narrow)
        narrow.grad = torch.randn(64, 96).to(dtype)
        wide.grad = narrow.grad.float()
        for optimizer in both:
            optimizer.step()
        assert torch.equal(narrow, wide.to(dtype))
    assert both[0].state[narrow]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("kind", [CAME, Muon])
def test_states_of_16_bit_weights_are_taken_up_as_they_were(kind: Any) -> None:
    """PyTorch rounds what it loads to the dtype of the weights."""
    torch.manual_seed(0)
    whole, parts = (nn.Parameter(torch.ones(64, 96).bfloat16()) for _ in range(2))
    options = {"lr": 1e-2, "weight_decay": 0.1}
    first, second, resumed = kind([whole], **options), kind([parts], **options), None
    for step in range(4):
        whole.grad = torch.randn(64, 96).bfloat16()
        parts.grad = whole.grad.clone()
        if step == 2:
            resumed = kind([parts], **options)
            resumed.load_state_dict(second.state_dict())
        first.step(), (resumed or second).step()
    assert torch.equal(whole, parts)
    assert all(t.dtype == torch.float32 for t in resumed.state[parts].values())


def test_came_resumes_from_its_state() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(6, 4, 3)

    def train(weight: nn.Parameter, optimizer: CAME, part: Tensor) -> None:
        for gradient in part:
            weight.grad = gradient
            optimizer.step()

    whole = nn.Parameter(torch.ones(4, 3))
    train(whole, CAME([whole], lr=1e-2), gradients)
    first = nn.Parameter(torch.ones(4, 3))
    optimizer = CAME([first], lr=1e-2)
    train(first, optimizer, gradients[:3])
    second = nn.Parameter(first.detach().clone())
    resumed = CAME([second], lr=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, gradients[3:])
    assert torch.equal(second, whole)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": 1.0, "betas": (0.9, 0.9)},
        {"lr": math.nan},
        {"lr": math.inf},
        {"lr": 1.0, "weight_decay": math.nan},
        {"lr": 1.0, "eps": (0.0, 1e-16)},
        {"lr": 1.0, "clip_threshold": math.nan},
        {"lr": 1.0, "betas": (0.9, math.nan, 0.9)},
    ],
)
def test_came_refuses_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        CAME([nn.Parameter(torch.ones(1))], **options)


SHARDED = """
import sys, torch
from torch import nn
from torch.distributed.tensor import DTensor
from pixart.training.ema import EMA
from pixart.distributed import connect, leave, rank, world_size
from pixart.training.optimizers import Muon, OptimizerSettings, build_optimizers
from pixart.training.parallel import parallelise
connect(torch.device("cpu"))
torch.manual_seed(0)
layers = [nn.Linear(5, 7), nn.Conv1d(4, 3, 1), nn.Tanh(), nn.Conv1d(3, 3, 2), nn.Linear(6, 64)]
model = parallelise(nn.Sequential(*layers, nn.Tanh(), nn.Linear(64, 64)), "fsdp")
data = torch.randn(8, 2, 4, 5, generator=torch.Generator().manual_seed(1))
settings = OptimizerSettings(name=sys.argv[2], learning_rate=1e-2, weight_decay=0.1)
optimizers = build_optimizers(model, settings)
ema = EMA(list(model.parameters()), 0.9)
for step in range(8):
    share = 2 // world_size()
    model(data[step, rank() * share : (rank() + 1) * share]).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    ema.update(step)
full = lambda t: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
tensors = [full(t) for t in (*model.parameters(), *ema.tensors)]
if rank() == 0:
    torch.save(tensors, sys.argv[1])
leave(0)
"""


def run_among(count: int, source: str, folder: Path, *arguments: str) -> None:
    script = folder / "script.py"
    script.write_text(source)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(count), str(script), *arguments]
    subprocess.run(command, env=env, check=True, timeout=120)


@pytest.mark.parametrize("name", ["came", "adamw"])
def test_weights_cut_among_processes_take_the_same_steps(tmp_path: Path, name: str) -> None:
    results = []
    for count in (1, 2):
        file = tmp_path / str(count)
        run_among(count, SHARDED, tmp_path, str(file), name)
        results.append(torch.load(file))
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


# Gradients that are the same to the last bit: two processes sum those of their samples in another
# order than one does, and where that takes an element to the next number in bf16, Muon's iterations
# magnify it beyond any tolerance that could still find a mistake.
MUON = """
import copy, torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from pixart.training.optimizers import Muon, OptimizerSettings, build_optimizers
from pixart.distributed import connect, leave
from pixart.training.parallel import parallelise
connect(torch.device("cpu"))
torch.manual_seed(0)
sizes = [(64, 64), (64, 130), (128, 65)]
whole = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes))
cut = parallelise(copy.deepcopy(whole), "fsdp")
settings = OptimizerSettings(name="muon", learning_rate=1e-2, weight_decay=0.1)
optimizers = [build_optimizers(model, settings) for model in (whole, cut)]
for _ in range(8):
    for one, part in zip(whole.parameters(), cut.parameters(), strict=True):
        assert isinstance(part, DTensor) and part.to_local().numel() < one.numel()
        one.grad = torch.randn(one.shape)
        part.grad = distribute_tensor(one.grad.clone(), part.device_mesh, part.placements)
    for optimizer in (*optimizers[0], *optimizers[1]):
        optimizer.step()
for one, part in zip(whole.parameters(), cut.parameters(), strict=True):
    assert torch.equal(one, part.full_tensor()), tuple(one.shape)
leave(0)
"""


def test_muon_takes_the_same_steps_of_matrices_cut_among_processes(tmp_path: Path) -> None:
    run_among(2, MUON, tmp_path)


@pytest.mark.parametrize("shape", [(64, 64), (130, 64), (65, 128)])
def test_muon_takes_pytorchs_steps(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, where bf16 is multiplied as PyTorch's Muon does everywhere."""
    monkeypatch.setattr("pixart.training.optimizers.has_bf16_products", lambda _: True)
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"lr": 1e-2, "weight_decay": 0.1}
    muon = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)  # type: ignore[arg-type]
    optimizers = (Muon([ours], **options), muon)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert optimizers[0].state_dict().keys() == muon.state_dict().keys()
    assert optimizers[0].state_dict()["param_groups"] == muon.state_dict()["param_groups"]


def test_the_rate_warms_up_and_decays_as_its_schedule_says() -> None:
    settings = OptimizerSettings(learning_rate=1.0, warmup_steps=10, final_ratio=0.0)
    assert settings.rate(0, 100, 256) == pytest.approx(0.1)
    assert settings.rate(50, 100, 256) == settings.rate(99, 100, 256) == 1.0
    linear = replace(settings, schedule="linear", decay_fraction=0.5)
    assert linear.rate(49, 100, 256) == 1.0 and linear.rate(75, 100, 256) == pytest.approx(0.5)
    cosine = replace(settings, schedule="cosine")
    assert cosine.rate(50, 100, 256) == pytest.approx(0.5)
    assert cosine.rate(25, 100, 256) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))


def test_the_rate_grows_with_the_batch_only_when_asked_to() -> None:
    settings = OptimizerSettings(learning_rate=1.0, warmup_steps=0)
    assert settings.rate(5, 10, 64) == 1.0
    assert replace(settings, rate_rule="sqrt").rate(5, 10, 64) == 0.5
    assert replace(settings, rate_rule="linear").rate(5, 10, 512) == 2.0


@pytest.mark.parametrize("name", ["came", "adamw", "muon", "adamw-8bit"])
def test_every_optimizer_lowers_a_loss_at_the_rate_that_is_set(name: Any) -> None:
    if name == "adamw-8bit":
        pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    x, losses = torch.randn(32, 64), []
    optimizers = build_optimizers(model, OptimizerSettings(name=name, learning_rate=1.0))
    for _ in range(40):
        loss = (model(x) - x[:, :1]).square().mean()
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            set_rate(optimizer, 1e-3)
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_muon_takes_the_same_steps_with_and_without_bf16_instructions(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the order in which products are added up, which moves a number of bf16 to the next."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    weights = []
    for has in (True, False):
        monkeypatch.setattr("pixart.training.optimizers.has_bf16_products", lambda _, has=has: has)
        weight = torch.zeros(shape, requires_grad=True)
        weight.grad = gradient.clone()
        Muon([weight], lr=1.0, weight_decay=0.0).step()
        weights.append(weight.detach())
    exact, other = weights
    assert (exact - other).norm() / exact.norm() < 0.02
    assert exact.norm() > 1


def test_muon_takes_the_large_matrices_and_adamw_the_rest() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8), nn.LayerNorm(8))
    model[1].bias.requires_grad_(False)
    adamw, muon = build_optimizers(model, OptimizerSettings(name="muon"))
    assert [p is model[0].weight for p in muon.param_groups[0]["params"]] == [True]
    assert len(adamw.param_groups[0]["params"]) == 4


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"clip_norm": -1.0}, "clip_norm must be positive"),
        ({"decay_fraction": 0.0}, "decay_fraction must be"),
        ({"betas": (0.9, 0.99)}, "betas must be 3 numbers for came"),
        ({"eps": 0.0, "name": "adamw"}, "eps must be positive"),
        ({"eps": 1e-10}, "eps must be None for came.*got 1e-10; leave it out"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        OptimizerSettings(**changes)


@pytest.mark.parametrize("name", ["adamw", "muon", "adamw-8bit"])
def test_adamw_steps_with_the_eps_that_is_set(name: Any) -> None:
    if name == "adamw-8bit":
        pytest.importorskip("torchao")
    moved = {}
    for eps in (None, 1e-10):
        layer = nn.Linear(1, 4)
        with torch.no_grad():
            layer.bias.zero_()
        settings = OptimizerSettings(name=name, learning_rate=1.0, eps=eps)
        (optimizer,) = build_optimizers(layer, settings)
        layer.bias.grad = torch.full((4,), 1e-9)
        optimizer.step()
        moved[eps] = layer.bias.detach()
    assert torch.allclose(moved[None], torch.tensor(-1 / 11), rtol=1e-3)
    assert torch.allclose(moved[1e-10], torch.tensor(-10 / 11), rtol=1e-3)


def test_8_bit_states_without_torchao_say_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match="must not be adamw-8bit without torchao"):
        build_optimizers(nn.Linear(2, 2), OptimizerSettings(name="adamw-8bit"))


@pytest.mark.parametrize("decay", [1.0, math.nan, -0.5])
def test_an_average_of_a_decay_that_means_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be from 0 to below 1, got"):
        EMA([nn.Parameter(torch.ones(1))], decay)


def test_averages_start_quickly_and_give_the_weights_back_bit_for_bit() -> None:
    weight = nn.Parameter(torch.zeros(3).bfloat16())
    ema = EMA([weight], 0.999)
    with torch.no_grad():
        weight.fill_(1.001)
    ema.update(0)
    assert ema.tensors[0].dtype == torch.float32
    assert torch.allclose(ema.tensors[0], 0.9 * weight.detach().float())
    before = weight.detach().clone()
    with pytest.raises(RuntimeError), ema.swapped():
        assert torch.equal(weight, ema.tensors[0].bfloat16())
        raise RuntimeError
    assert torch.equal(weight, before)
