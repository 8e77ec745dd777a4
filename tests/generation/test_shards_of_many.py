"""A list of a million prompts is planned in little memory, and its bad line found before the first picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLAN = """
import json, sys
from pathlib import Path
from pixart.device import process_memory
from pixart.generate import main
from pixart.generation.options import Options
from pixart.generation.shards import plan_shards

count, bad, peak = int(sys.argv[1]), int(sys.argv[2]), "VmHWM"

def line(k):
    long = "a photo of a cat on a sofa in soft light " * 5
    settings = {"seed": k, "steps": 10 + k % 7, "size": ["512", "768x512", "1024"][k % 3]}
    return json.dumps({"prompt": f"{k} {long}", "name": f"cat {k}", **settings}) + chr(10)

with open("list.jsonl", "w") as file:
    file.writelines(map(line, range(count)))
options = Options(prompts=Path("list.jsonl"), output=Path("{shard:05d}.tar"), device="cpu")
before = process_memory(peak)
plan = plan_shards(options)
planned = process_memory(peak)
[last] = plan.tasks([len(plan) - 1])
said = {"before": before, "planned": planned, "tars": len(plan), "pictures": plan.pictures,
        "kinds": sum(1 for _ in plan.examples()), "last": json.dumps(last.lines[-1].values)}
with open("list.jsonl", "w") as file:
    for k in range(count):
        file.write(line(k) if k + 1 != bad else line(k).replace('"steps"', '"stpes"'))
said["code"] = main(["--prompts", "list.jsonl", "--output", "{shard:05d}.tar", "--device", "cpu"])
print(json.dumps(said))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell no peak of a process alone")
@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.exhaustive)])
def test_a_long_list_is_planned_in_little_memory(count: int, tmp_path: Path) -> None:
    bad = count * 9 // 10 + 1
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PLAN, str(count), str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["planned"] < 500 * 10**6
    assert said["planned"] - said["before"] < 50 * 10**6, "no line is kept"
    assert (said["tars"], said["pictures"], said["kinds"]) == (count // 1000, count, 21)
    assert json.loads(said["last"])["name"] == f"cat {count - 1}"
    assert said["code"] == 2
    assert f"list.jsonl, line {bad}: unknown setting 'stpes'; did you mean 'steps'?" in done.stderr
    assert os.listdir(tmp_path) == ["list.jsonl"]
