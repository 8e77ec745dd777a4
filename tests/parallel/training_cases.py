"""Run by test_training_among.py: stages trained by processes that share the tokens of pictures, against the
same trained by one. Prints a line of JSON for each case."""

import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft  # noqa: F401  once, and not in every fork
import torch
import torch._dynamo
from forked import among
from small_model import build, relative_error
from torch import Tensor, nn

from pixart.config import KVCompression
from pixart.dataset.batches import FeatureBatch
from pixart.distributed import rank, world_size
from pixart.model import exchange
from pixart.training.optimizers import OptimizerSettings
from pixart.training.plan import exchanged_bytes
from pixart.training.progress import Progress
from pixart.training.stage import Batch, ControlSettings, Data, LoRA, ResolvedStage, Stage
from pixart.training.starts import add_adapters, add_control_adapters
from pixart.training.tasks.controlnet import ControlTask
from pixart.training.tasks.transformer import DenoisingTask
from pixart.training.trainer import Trainer
from pixart.training.validation import Validation

CPU = torch.device("cpu")
STEPS = 3
# 13 × 7 tokens, which come out even for nobody, and 8 × 8.
BUCKETS = [(208, 112)] * 8 + [(128, 128)] * 8
HALF, QUARTER = KVCompression((0, 1, 2), 2), KVCompression((1,), 4)
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "R2": {"kv_compression": HALF},
    "mixed": {"kv_compression": QUARTER, "qk_norm": True},
    "sized": {"kv_compression": KVCompression((1, 2), 2), "micro_condition": True},
    "adapters": {"kv_compression": KVCompression((1,), 2)},
    "control": {"kv_compression": KVCompression((1,), 2)},
}

TRAINED = ("mixed", "sized", "adapters", "control")  # for some steps, not the first alone


class Samples:
    """Prepared features of pictures that are nowhere."""

    scaling_factor = None
    buckets = BUCKETS

    def __len__(self) -> int:
        return len(BUCKETS)

    def check_captions(self, weights: Mapping[str, float]) -> None:
        pass

    def batch(self, indices: Sequence[int], rng: random.Random, *_: Any, **__: Any) -> FeatureBatch:
        [index] = indices
        generator = torch.Generator().manual_seed(index)
        height, width = BUCKETS[index]

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        image, length = (1, 4, height // 8, width // 8), 5 + index % 6
        return FeatureBatch(
            mean=drawn(*image),
            std=drawn(*image).abs(),
            features=drawn(1, length, 48),
            mask=torch.ones(1, length, dtype=torch.bool),
            size=torch.tensor([[2.0 * height, 3.0 * width]]),
            aspect_ratio=torch.full((1, 1), height / width),
            control_mean=drawn(*image),
            control_std=drawn(*image).abs(),
        )


def stage_of(name: str, **changes: Any) -> ResolvedStage:
    stage = Stage(
        name,
        aspect=True,
        resolution=128,
        trains="controlnet" if name == "control" else "transformer",
        lora=LoRA(4 if name == "adapters" else 0),
        control=ControlSettings(blocks=2 if name == "control" else None),
        data=Data(caption_dropout=0.3),
        batch=Batch(images=4, accumulate=2),
        optimizer=OptimizerSettings(
            name="adamw", learning_rate=1e-3, eps=1e-4, warmup_steps=1, clip_norm=0.5
        ),
        steps=STEPS,
        ema=0.5,
        min_snr=5.0,
        precision="fp32",
        validation=Validation(every=STEPS, images=3, timesteps=(300,)),
    )
    return replace(stage, **changes).resolved()


def task_of(stage: ResolvedStage, name: str) -> DenoisingTask:
    torch.manual_seed(0)  # the null caption
    # 4 heads: three processes cannot exchange them.
    model = build(num_heads=4, depth=3, **MODELS[name])
    data: Any = Samples()
    if name == "control":
        network = add_control_adapters(stage, model.new_control(2))
        generator = torch.Generator().manual_seed(3)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        return ControlTask(network, model, stage, data, CPU)
    task = DenoisingTask(model, stage, data, CPU)
    add_adapters(stage, model)
    if name == "adapters":
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1, generator=generator)
    return task


class Told(Progress):
    """What a step is said to have seen."""

    def step(self, step: int, values: dict[str, float], *rest: Any) -> None:
        self.seen = [*getattr(self, "seen", []), rest[2:]]
        super().step(step, values, *rest)


def whole(tensor: Tensor) -> Tensor:
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def begin(folder: Path, name: str, **changes: Any) -> Trainer:
    stage = stage_of(name, **changes)
    return Trainer(task_of(stage, name), stage, folder, CPU)


def first_step(trainer: Trainer) -> dict[str, Any]:
    """Losses and gradients."""
    losses = trainer._backward(trainer._load(0))
    named = trainer.model.named_parameters()
    gradients = {name: whole(p.grad) for name, p in named if p.grad is not None}
    trainer.model.zero_grad()
    return {"losses": losses, "gradients": gradients}


def steps(trainer: Trainer, count: int | None = None) -> dict[str, Any]:
    """What some steps come to."""
    progress = Told(trainer.directory, "told", every=1, quiet=True)
    trainer.run(progress, count)
    assert trainer.ema is not None
    logged = (trainer.directory / "log.jsonl").read_text().splitlines()
    told = ("loss", "mse", "vb", "norm", "validation/loss")
    return {
        "weights": [whole(tensor) for tensor in (*trainer.parameters, *trainer.ema.tensors)],
        "log": [{k: v for k, v in json.loads(line).items() if k in told} for line in logged],
        "seen": progress.seen,
    }


def first_error(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest relative differences of the first step. Those of gradients that are nothing but rounding,
    such as of what all keys have in common, are by the norm of all."""
    gradients, others = found["gradients"], expected["gradients"]
    assert gradients.keys() == others.keys()
    least = 1e-4 * torch.stack([one.norm() for one in others.values()]).norm()
    errors = [
        (gradients[name] - one).norm() / one.norm().clamp(least) for name, one in others.items()
    ]
    return {
        "losses": apart(found["losses"], expected["losses"]),
        "gradients": float(max(errors)),
        "tensors": len(others),
    }


def last_error(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Those of what the steps came to."""
    assert len(found["log"]) == len(expected["log"]) == STEPS + 1  # the last is validation's
    return {
        "log": max(map(apart, found["log"], expected["log"])),
        "weights": max(map(relative_error, found["weights"], expected["weights"])),
        "same count": found["seen"] == expected["seen"],
    }


def apart(numbers: Mapping[str, float], others: Mapping[str, float]) -> float:
    assert numbers.keys() == others.keys()
    return max(abs(numbers[name] / others[name] - 1) for name in numbers)


def say(case: str, sequence: int, **facts: Any) -> None:
    if rank() == 0:
        mesh = f"{world_size() // sequence}x{sequence}"
        print(json.dumps({"case": case, "mesh": mesh, **facts}))


def shared(folder: Path, name: str, sequence: int, **changes: Any) -> None:
    """A stage that all processes train together."""
    place = folder / f"{world_size()}-{name}"
    trainer = begin(place, name, parallel="fsdp+sequence", sequence=sequence, **changes)
    expected = torch.load(folder / f"{name}.pt")
    error = first_error(first_step(trainer), expected)
    if world_size() > sequence and name in TRAINED:
        error |= last_error(steps(trainer), expected)
    say(name, sequence, **error)


def goes_on(folder: Path, parallel: str, sequence: int = 1) -> None:
    """A further step of a run that other layouts began."""
    trainer = begin(folder / "moved", "sized", parallel=parallel, sequence=sequence)
    found = steps(trainer, 1)
    if trainer.step == STEPS:
        expected = torch.load(folder / "sized.pt")
        # What is counted is of the last step alone.
        say("moved", sequence, **last_error({**found, "seen": expected["seen"]}, expected))


def broken(folder: Path, lost: str, name: str) -> None:
    """A first step where what other processes send is lost."""
    exchanged = getattr(exchange, lost)

    def lossy(rows: Tensor, *arguments: Any) -> Tensor:
        received = exchanged(rows, *arguments)
        if received.dim() != 5:  # the prediction at the end
            return received
        counts, place = arguments[-2], rank() % len(arguments[-2])
        parts = list(received.split(counts))
        return torch.cat([part * (at == place) for at, part in enumerate(parts)])

    trainer = begin(folder, name, parallel="fsdp+sequence", sequence=2)
    setattr(exchange, lost, lossy)
    try:
        found = first_step(trainer)
    finally:
        setattr(exchange, lost, exchanged)
    say(f"broken {lost}", 2, **first_error(found, torch.load(folder / f"{name}.pt")))


def counted(name: str, sequence: int, checkpoints: int, precision: str) -> None:
    """Bytes that this process receives in a step from those that it shares pictures with, and those that are
    computed beforehand. Of square pictures, whose rows come out even."""
    changes = {"checkpoint_blocks": checkpoints, "precision": precision}
    trainer = begin(Path(), name, parallel="fsdp+sequence", sequence=sequence, **changes)
    steps = (trainer._load(step) for step in range(9))
    parts = next(parts for parts in steps if parts[0].latents.shape[2:] == (16, 16))
    received: list[int] = []
    gathered, swapped = exchange._gathered, exchange._swapped

    def count(rows: Tensor, counts: Sequence[int]) -> None:
        others = sum(counts) - counts[rank() % sequence]
        received.append(others * rows[0].numel() * rows.element_size())

    def gather(rows: Tensor, counts: Sequence[int], group: Any) -> Tensor:
        count(rows, counts)
        return gathered(rows, counts, group)

    def swap(rows: Tensor, sent: Sequence[int], counts: Sequence[int], group: Any) -> Tensor:
        count(rows, counts)
        return swapped(rows, sent, counts, group)

    exchange._gathered, exchange._swapped = gather, swap
    try:
        trainer._backward(parts)
    finally:
        exchange._gathered, exchange._swapped = gathered, swapped
    task: Any = trainer.task
    computed = sum(map(len, parts)) * exchanged_bytes(trainer.stage, task.config, (8, 8))
    case = f"bytes of {name}, {precision}, every {checkpoints}"
    say(case, sequence, received=sum(received), computed=computed)


def one(folder: Path) -> None:
    for name in MODELS:
        trainer = begin(folder / name, name)
        found = first_step(trainer)
        if name in TRAINED:
            found |= steps(trainer)
        torch.save(found, folder / f"{name}.pt")


def four(folder: Path) -> None:
    for name in TRAINED:
        shared(folder, name, 2)
    shared(folder, "R2", 4, checkpoint_blocks=0)
    counted("R2", 2, 1, "fp32")
    counted("control", 2, 2, "fp32")
    counted("dense", 4, 0, "bf16")
    broken(folder, "_gathered", "R2")
    broken(folder, "_swapped", "dense")
    goes_on(folder, "fsdp+sequence", 2)


def three(folder: Path) -> None:
    shared(folder, "dense", 3)
    shared(folder, "sized", 3)
    goes_on(folder, "fsdp+sequence", 3)


def two(folder: Path) -> None:
    shared(folder, "dense", 2)
    shared(folder, "R2", 2)
    goes_on(folder, "ddp")


WORK: dict[int, Callable[[Path], None]] = {1: one, 4: four, 3: three, 2: two}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for count, work in WORK.items():
        among(count, lambda work=work: work(place))  # type: ignore[misc]
