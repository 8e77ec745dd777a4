"""The stub of the CUDA driver: what it refuses, counts and logs."""

import subprocess
from pathlib import Path

import pytest
import stubbed

from bench.compiled import stub_driver

needs_compiler = pytest.mark.skipif(not stubbed.has_compiler(), reason="needs a C compiler")

LAUNCHES = """
q, k, v = torch.zeros(1, 64, 3, 2, 72, dtype=torch.bfloat16).unbind(2)
x = torch.zeros(1, 64, 144, dtype=torch.bfloat16)
row = torch.zeros(1, 144)
with torch.no_grad():
    out = flash_attention(q, k, v)
    modulate(x, row, row)
print(json.dumps([list(out.shape)] + [stub_driver.counted(what) for what in stub_driver.COUNTS]))
"""


@needs_compiler
def test_cpu_tensors_go_the_way_of_a_launch(tmp_path: Path) -> None:
    log = tmp_path / "log"
    shape, launches, maps, refused = stubbed.run(LAUNCHES, log=log)
    lines = stub_driver.logged(log)
    assert shape == [1, 64, 2, 72] and refused == 0
    started = [line for line in lines if line["kind"] == "launch"]
    described = [line for line in lines if line["kind"] == "map"]
    assert (len(started), len(described)) == (launches, maps) and launches == 2
    assert all(line["kernel"] and min(line["grid"]) > 0 for line in started)
    assert all(line["bytes"] == 2 and line["dims"][:3] == [72, 64, 2] for line in described)
    assert not any(line["refused"] for line in lines)


MAPS = """
import ctypes
library = stub_driver._library
def encode(base=0, dims=(72, 64, 16, 1), strides=(6912, 144, 16), box=(64, 64, 1, 1), swizzle=3, kind=9):
    memory = (ctypes.c_char * 256)()
    address = ctypes.addressof(memory)
    place = ctypes.c_void_p(address + -address % 64)
    rank = len(dims)
    return library.cuTensorMapEncodeTiled(
        place, kind, rank, ctypes.c_void_p(base), (ctypes.c_uint64 * rank)(*dims),
        (ctypes.c_uint64 * rank)(*strides), (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank), 0, swizzle, 2, 0)
wrong = [dict(base=8), dict(strides=(6912, 72, 16)), dict(strides=(0, 144, 16)), dict(dims=(72, 0, 16, 1)),
    dict(box=(64, 512, 1, 1)), dict(box=(128, 64, 1, 1)), dict(box=(4, 64, 1, 1), swizzle=0), dict(kind=13),
    dict(dims=(8,) * 6, strides=(16,) * 5, box=(8,) * 6)]
right = [dict(), dict(box=(8, 64, 1, 1), swizzle=0), dict(kind=7, box=(32, 64, 1, 1))]
codes = [encode(**one) for one in wrong], [encode(**one) for one in right]
print(json.dumps([*codes, stub_driver.counted("maps"), stub_driver.counted("refused")]))
"""


@needs_compiler
def test_maps_that_a_gpu_would_refuse_are_refused_with_the_reason(tmp_path: Path) -> None:
    log = tmp_path / "log"
    wrong, right, maps, refused = stubbed.run(MAPS, log=log)
    assert all(wrong) and not any(right) and (maps, refused) == (len(right), len(wrong))
    reasons = [line["refused"] for line in stub_driver.logged(log)]
    assert all(reasons[: len(wrong)]) and len(set(reasons)) == len(wrong) and not any(reasons[-3:])


@needs_compiler
def test_the_library_is_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = stub_driver.build()
    assert path.parent.parent == tmp_path / "pixart" / "stub_driver"
    monkeypatch.setattr(subprocess, "run", None)
    assert stub_driver.build() == path
    assert sorted(path.parent.iterdir()) == [path]


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError, match="needs a C compiler, found no cc or gcc or clang"):
        stub_driver.build()
    assert not list(tmp_path.iterdir())


def test_it_is_not_activated_too_late_or_for_a_gpu_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="architecture must be one of sm_75, .*, got sm_61"):
        stub_driver.activate("sm_61")
    monkeypatch.setitem(stub_driver.sys.modules, "triton", stub_driver)
    with pytest.raises(RuntimeError, match="must be activated before triton is imported"):
        stub_driver.activate()


def test_counts_have_names() -> None:
    with pytest.raises(ValueError, match="what must be one of launches, maps, refused, got runs"):
        stub_driver.counted("runs")
