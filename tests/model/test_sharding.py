"""Models cut among processes block by block, as FSDP2's tutorials do it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# Prints the worst relative error of outputs and gradients, against the model that is whole.
SCRIPT = """
import torch
from torch.distributed.fsdp import fully_shard
from small_model import build, inputs, relative_error
from pixart.distributed import connect, leave, rank, share, world_size

connect(torch.device("cpu"))


def own(x):
    return torch.stack(share(list(x), rank(), world_size()))


for how in ("plain", "validated", "checkpointed", "accumulated"):
    whole, model = (build(class_dropout_prob=0.0).train() for _ in range(2))
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=how == "plain" or block is not model.blocks[-1])
    if how == "checkpointed":
        model.gradient_checkpointing = 1
        fully_shard(model.final_layer)
    fully_shard(model)
    if how == "validated":  # which leaves the last block whole
        with torch.no_grad():
            model(*inputs())
    errors = []
    for turn in range(2):  # gradients add up
        batch = [x + turn for x in inputs()]
        expected = whole(*batch)
        expected.square().mean().backward()
        model.set_requires_gradient_sync(how != "accumulated" or turn == 1)
        out = model(*map(own, batch))
        out.square().mean().backward()
        errors.append(relative_error(out, own(expected)))
    for cut, parameter in zip(model.parameters(), whole.parameters(), strict=True):
        assert (cut.grad is None) == (parameter.grad is None)
        if parameter.grad is not None:
            errors.append(relative_error(cut.grad.full_tensor(), parameter.grad))
    assert len(errors) > 40, len(errors)
    if rank() == 0:
        print(how, max(errors))
leave(0)
"""


def test_blocks_that_fsdp_cuts_one_by_one_train_as_the_whole_model(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = (ROOT, ROOT / "kernels", ROOT / "tests" / "builders")
    env = {**os.environ, "PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", str(tmp_path / "script.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    worst = dict(line.split() for line in done.stdout.splitlines())
    assert set(worst) == {"plain", "validated", "checkpointed", "accumulated"}
    assert all(float(error) < 1e-4 for error in worst.values()), worst
