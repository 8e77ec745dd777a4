"""No code of a file is ever run: what could do so is looked for in the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = [
    path
    for top in ("pixart", "bench", "kernels/pixart_kernels", "kernels/examples")
    for path in sorted((ROOT / top).rglob("*.py"))
]
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pandas", "shelve"}
DISTRIBUTED = "torch.distributed.checkpoint"  # its readers unpickle; its state_dict reads nothing
# The one unpickler, which makes records of names that it knows; and a reader of opcodes.
READERS = {"pixart/training/earlier_states.py", "pixart/tensors.py"}
RUNS = {
    "eval", "exec", "pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load",
    "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.export.load",
    "torch._inductor.aoti_load_package", "runpy.run_path", "dcp.load",
}  # fmt: skip


def faults(source: str, name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            modules = []
        for module in modules:
            top = module.split(".")[0]
            is_reader = module.startswith(DISTRIBUTED) and ".state_dict" not in module
            is_pickle = top == "pickle" and name not in READERS
            if top in PICKLES or is_pickle or is_reader:
                yield f"{name}: imports {module}"
        if isinstance(node, ast.Call):
            yield from (f"{name}:{node.lineno} {fault}" for fault in call_faults(node))


def call_faults(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if called in RUNS or called in ("pickle.Unpickler", "pickle._Unpickler"):
        yield f"calls {called}"
    if called == "torch.load" and given.get("weights_only") != "True":
        yield "calls torch.load without weights_only=True"
    for option in ("allow_pickle", "trust_remote_code"):
        if given.get(option, "False") != "False":
            yield f"gives {option}"
    if called == "yaml.load" and "Safe" not in "".join(map(ast.unparse, node.args)):
        yield "calls yaml.load"
    if called.endswith("AutoModelForImageTextToText.from_pretrained") and (
        "trust_remote_code" not in given
    ):
        yield "leaves trust_remote_code to a question"


def test_nothing_runs_the_code_of_a_file() -> None:
    found = [
        fault
        for path in SOURCES
        for fault in faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert len(SOURCES) > 150 and found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal",
        "import joblib",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed.checkpoint import FileSystemReader",
        "from torch.distributed import checkpoint; checkpoint.load(x)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text, yaml.Loader)",
        "torch.jit.load(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_what_would_run_it_is_found(line: str) -> None:
    assert list(faults(line, "x.py"))


@pytest.mark.parametrize(
    "line",
    [
        "from torch.distributed.checkpoint.state_dict import get_state_dict",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "model.eval()",
    ],
)
def test_what_would_not_is_left_alone(line: str) -> None:
    assert list(faults(line, "x.py")) == []
