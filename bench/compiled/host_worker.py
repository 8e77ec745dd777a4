"""What bench.host measures, in a process of its own: there a stub stands for the CUDA driver.

It calls public operators and the model alone, so that earlier revisions can be measured by it too:
`start` takes pixart and pixart_kernels from whatever checkout it is given, and bench from this one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.compiled import stub_driver
from pixart.files import parse_json

ROOT = Path(__file__).parent.parent.parent
ARCHITECTURE = "sm_90"
LAYER_NORM = "F.layer_norm"
FORWARD, RECORDING, BACKWARD = "forward", "forward that records", "backward"
OURS, EAGER, THEIRS = "ours", "eager references", "diffusers"
MODEL = "model of 28 small blocks"
PASSES = (FORWARD, "forward and backward")  # of the model
TIMEOUT = 900  # seconds; compiling all kernels takes a minute
# `bench` is this checkout's, whatever else the program imports is the other's.
PROGRAM = """
import sys, types
bench = types.ModuleType("bench")
bench.__path__ = [sys.argv[1]]
sys.modules["bench"] = bench
from bench.compiled import host_worker
host_worker.main(*sys.argv[2:])
"""

Call = Callable[[], object]
Rows = dict[str, dict[str, dict[str, Any]]]  # by case and variant


def start(what: str, seconds: float, least_rounds: int, tree: Path = ROOT) -> Rows:
    """Measure "operators" or "model" of the checkout `tree`. Raises RuntimeError if that fails."""
    paths = os.pathsep.join([str(tree / "kernels"), str(tree), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "bench"), what, str(seconds)]
    done = subprocess.run(
        [*command, str(least_rounds)],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word of why"])[-1])
    return parse_json(done.stdout.splitlines()[-1], "the worker's rows")


def main(what: str, seconds: str, least_rounds: str) -> None:
    stub_driver.activate(ARCHITECTURE)
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # nothing is computed: outputs are what memory held
    cases = operators() if what == "operators" else models()
    found: Rows = {}
    for name, variants in cases:
        found[name] = _measured(variants, float(seconds), int(least_rounds))
    print(json.dumps(found))


def _measured(
    variants: Mapping[str, Call], seconds: float, least_rounds: int
) -> dict[str, dict[str, Any]]:
    """The variants in turn with a call of PyTorch's own, whose time says how fast the machine is."""
    from bench.measure import timing

    launches = {}
    for name, call in variants.items():
        call()  # compiles
        before = stub_driver.counted("launches")
        call()
        launches[name] = stub_driver.counted("launches") - before
    calls = {**variants, LAYER_NORM: layer_norm()}
    times = timing.measure_host(calls, seconds=seconds, least_rounds=least_rounds)
    least = {name: min(one.samples) for name, one in times.items()}
    return {
        name: {
            "seconds": times[name].summary() | {"least": least[name]},
            "samples": times[name].samples,
            "launches": launches[name],
            "layer_norms": least[name] / least[LAYER_NORM],
        }
        for name in variants
    }


def layer_norm() -> Call:
    import torch

    x = torch.zeros(1, 4, 8)

    return lambda: torch.nn.functional.layer_norm(x, (8,))


def operators() -> Iterator[tuple[str, dict[str, Call]]]:
    """Calls of each operator: without gradients, recording one, and backward."""
    import torch

    with torch.no_grad():
        yield LAYER_NORM, {"torch": layer_norm()}
        for name, (call, _) in _calls(False).items():
            yield f"{name} {FORWARD}", {OURS: call}
    for name, (call, inputs) in _calls(True).items():
        yield f"{name} {RECORDING}", {OURS: call}
        yield f"{name} {BACKWARD}", {OURS: _backward_of(call, inputs)}


def _calls(with_gradients: bool) -> dict[str, tuple[Call, Sequence[Any]]]:
    """By name, with the leaves of its graph. At the width of XL/2 and few tokens: the host's time
    depends on neither, but for the bound, which long sequences look for."""
    import torch

    import pixart_kernels as kernels

    heads, head_dim, tokens, keys, side = 16, 72, 16, 300, 4
    width = heads * head_dim

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def leaves(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(one.detach().requires_grad_(with_gradients) for one in tensors)

    q, k, v = leaves(*zeros(1, tokens, 3, heads, head_dim).unbind(2))
    long_q, long_k, long_v = leaves(*zeros(1, 2048, 3, heads, head_dim).unbind(2))
    (query,) = leaves(zeros(1, tokens, heads, head_dim))
    text_k, text_v = leaves(*zeros(1, keys, 2, heads, head_dim).unbind(2))
    x, branch = leaves(zeros(1, tokens, width), zeros(1, tokens, width))
    shift, scale, gate = leaves(*zeros(1, 6, width, dtype=torch.float32).unbind(1)[:3])
    flat_k, flat_v = leaves(*zeros(1, tokens, 3, width).unbind(2)[1:])
    taps, bias = leaves(zeros(width, 1, 2, 2), zeros(width))
    norm_weight, norm_bias = leaves(zeros(width), zeros(width))
    attention, merge = kernels.flash_attention, kernels.compress_kv
    weights = (taps, bias, norm_weight, norm_bias)
    found: dict[str, tuple[Call, Sequence[Any]]] = {
        "flash_attention self": (lambda: attention(q, k, v), (q, k, v)),
        "flash_attention cross": (
            lambda: attention(query, text_k, text_v),
            (query, text_k, text_v),
        ),
        "flash_attention bounded": (
            lambda: attention(long_q, long_k, long_v),
            (long_q, long_k, long_v),
        ),
        "modulate": (lambda: kernels.modulate(x, shift, scale), (x, shift, scale)),
        "gate_add": (lambda: kernels.gate_add(x, branch, gate), (x, branch, gate)),
        "gate_add_modulate": (
            lambda: kernels.gate_add_modulate(x, branch, gate, shift, scale),
            (x, branch, gate, shift, scale),
        ),
        "compress_kv": (
            lambda: merge(flat_k, flat_v, *weights, grid=(side, tokens // side), ratio=2),
            (flat_k, flat_v, *weights),
        ),
    }
    return found


def _backward_of(call: Call, inputs: Sequence[Any]) -> Call:
    """Gradients that nobody adds up: PyTorch would on this CPU, not the host."""
    import torch

    output: Any = call()
    outputs = output if isinstance(output, tuple) else (output,)
    given = [torch.zeros_like(one) for one in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, given, retain_graph=True)


def models() -> Iterator[tuple[str, dict[str, Call]]]:
    """Passes of a model of XL/2's depth, so narrow that a CPU computes the rest of it in no time."""
    import torch

    from pixart.config import PixArtConfig
    from pixart.model.transformer import PixArt

    config = PixArtConfig(
        input_size=8,
        hidden_size=144,
        num_heads=2,
        depth=28,
        caption_channels=64,
        model_max_length=16,
        pe_interpolation=1.0,
        class_dropout_prob=0.0,
    )
    latents, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500])
    caption = torch.randn(1, 16, 64).bfloat16()
    model = PixArt(config).bfloat16()
    forward, training = (f"{MODEL}, {one}" for one in PASSES)

    def train() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(latents, timesteps, caption).sum().backward()

    model.train()
    yield training, {OURS: train, EAGER: _with_references(train)}
    model.eval()
    with torch.no_grad():
        encoded = model.encode_caption(caption)

        def draw() -> None:
            model(latents, timesteps, encoded)

        calls: dict[str, Call] = {OURS: draw, EAGER: _with_references(draw)}
        theirs = _theirs(config, latents, timesteps, caption)
        yield forward, calls if theirs is None else {**calls, THEIRS: theirs}


def _theirs(config: Any, latents: Any, timesteps: Any, caption: Any) -> Call | None:
    try:
        from diffusers import PixArtTransformer2DModel
    except ImportError:
        return None
    from pixart.checkpoint.config import config_to_diffusers

    model: Any = PixArtTransformer2DModel.from_config(config_to_diffusers(config)).bfloat16().eval()
    conditions = {"resolution": None, "aspect_ratio": None}
    return lambda: model(
        latents.to(caption.dtype),
        encoder_hidden_states=caption,
        timestep=timesteps,
        added_cond_kwargs=conditions,
        return_dict=False,
    )


def _with_references(call: Call) -> Call:
    """The same with eager PyTorch in the place of each operator."""

    def run() -> None:
        with _references():
            call()

    return run


@contextmanager
def _references() -> Iterator[None]:
    import pixart_kernels as kernels

    names = [name for name in vars(kernels) if hasattr(kernels, f"{name}_reference")]
    replaced = [
        (vars(module), name, vars(module)[name])
        for place, module in list(sys.modules.items())
        if place.startswith("pixart.model.")
        for name in names
        if vars(module).get(name) is getattr(kernels, name)
    ]
    for names_of, name, _ in replaced:
        names_of[name] = getattr(kernels, f"{name}_reference")
    try:
        yield
    finally:
        for names_of, name, operator in replaced:
            names_of[name] = operator
