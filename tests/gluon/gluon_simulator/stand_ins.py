"""Stand-ins for the modules of Gluon that a kernel imports: what they do, a Machine does.

Layouts are nothing here, but for SharedLinearLayout, which Tile.viewed_as reads. Names are those of
the Triton that is installed, so that a kernel for several takes the branch that it takes there.
"""

import re
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from gluon_simulator.machine import Machine
from gluon_simulator.tiles import Barriers, NewestTile, OldestTile, Region, Tile
from gluon_simulator.values import Fault, Tensor, data

GLUON = "triton.experimental.gluon"
HOPPER = GLUON + ".language.nvidia.hopper"
_ROUND = re.compile(r"cvt\.rn\.(bf16|f16)x2\.f32 \$0, \$2, \$1;")


def has_oldest_names() -> bool:
    """Whether the Triton that is installed is one before 3.8, whose names differ."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)


def modules(machine: Machine, program: tuple[int, ...], grid: tuple[int, ...]) -> dict[str, Any]:
    """By name, what `import` finds while a kernel's modules are loaded for that program of a grid."""
    oldest = has_oldest_names()
    gl = _language(machine, program, grid, OldestTile if oldest else NewestTile)
    setattr(gl, "thread_barrier" if oldest else "barrier", lambda: None)
    gluon = types.ModuleType(GLUON)
    gluon.jit = gluon.constexpr_function = _decorated  # type: ignore[attr-defined]
    gluon.language = gl  # type: ignore[attr-defined]
    copy_name = "async_copy_global_to_shared" if oldest else "async_load"
    hopper = types.ModuleType(HOPPER)
    vars(hopper).update(
        mbarrier=types.SimpleNamespace(
            MBarrierLayout=_nothing,
            init=machine.init,
            wait=machine.wait,
            arrive=machine.arrive,
            expect=machine.expect,
        ),
        tma=types.SimpleNamespace(**{copy_name: machine.copy}),
        fence_async_shared=machine.fence,
        warpgroup_mma=machine.multiply,
        warpgroup_mma_wait=machine.finish,
    )
    found = {GLUON: gluon, GLUON + ".language": gl, HOPPER: hopper}
    for name in ("triton", "triton.experimental", GLUON + ".language.nvidia"):
        found[name] = types.ModuleType(name)
    for name, module in found.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(found[parent], child, module)
    return found


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _decorated(function: Any = None, **options: Any) -> Any:
    return _unchanged if function is None else function


def _unchanged(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _elementwise(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def apply(*xs: Any) -> Tensor:
        with np.errstate(all="ignore"):
            return Tensor(function(*(data(x) for x in xs)))

    return apply


def _where(condition: Any, a: Any, b: Any) -> Tensor:
    a, b = data(a), data(b)
    kind = np.result_type(a, b)
    return Tensor(np.where(data(condition), np.asarray(a, kind), np.asarray(b, kind)))


def _inline_assembly(
    asm: str, constraints: str, args: Any, dtype: str, is_pure: bool, pack: int
) -> Tensor:
    """Of all assembly, the rounding of pairs: the second number of a pair is the upper half."""
    (x,) = args
    match = _ROUND.fullmatch(asm)
    if not match or (constraints, pack) != ("=r,r,r", 2):
        raise Fault(f"assembly that the simulator does not know: {asm!r}")
    if {"bf16": "bf16", "f16": "fp16"}[match[1]] != dtype:
        raise Fault(f"{asm!r} does not make {dtype}")
    return x.to(dtype)


def _language(
    machine: Machine, program: tuple[int, ...], grid: tuple[int, ...], tile: type[Tile]
) -> types.ModuleType:
    def allocate(dtype: str, shape: Any, layout: Any = None) -> Any:
        count, *rest = (int(n) for n in shape)
        if dtype == "int64":
            return Barriers(count)
        return tile(machine, [Region(rest, dtype) for _ in range(count)], dtype)

    def static_assert(condition: Any, message: str = "") -> None:
        assert condition, message

    def full(shape: Any, value: Any, dtype: str, layout: Any = None) -> Tensor:
        return Tensor(np.full([int(n) for n in shape], data(value), np.float32)).to(dtype)

    gl = types.ModuleType(GLUON + ".language")
    vars(gl).update(
        constexpr=_unchanged,
        static_range=range,
        static_assert=static_assert,
        **{"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"},
        **{"int32": "int32", "int64": "int64"},
        program_id=lambda axis: Tensor(np.int64(program[axis])),
        num_programs=lambda axis: Tensor(np.int64(grid[axis])),
        arange=lambda first, end, layout=None: Tensor(np.arange(int(first), int(end))),
        full=full,
        zeros=lambda shape, dtype, layout=None: full(shape, 0.0, dtype),
        where=_where,
        cdiv=lambda a, b: (a + b - 1) // b,
        exp2=_elementwise(np.exp2),
        log2=_elementwise(np.log2),
        abs=_elementwise(np.abs),
        maximum=_elementwise(np.maximum),
        minimum=_elementwise(np.minimum),
        max=lambda x, axis: Tensor(x.data.max(axis)),
        sum=lambda x, axis: Tensor(x.data.sum(axis, dtype=np.float32)),
        convert_layout=_unchanged,
        inline_asm_elementwise=_inline_assembly,
        load=machine.load,
        store=machine.store,
        atomic_add=machine.add,
        allocate_shared_memory=allocate,
        shared_memory_descriptor=tile,
        warp_specialize=lambda functions, warps, registers: machine.add_partitions(functions),
        SharedLinearLayout=_unchanged,
        NVMMASharedLayout=_nothing,
        NVMMADistributedLayout=_nothing,
        DotOperandLayout=_nothing,
        SliceLayout=_nothing,
        BlockedLayout=_nothing,
    )
    return gl
