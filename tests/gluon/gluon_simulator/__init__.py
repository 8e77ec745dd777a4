"""Run a Gluon kernel for Hopper without a GPU: its own source, on NumPy, partition by partition.

    kernel = Kernel("pixart_kernels.attention.hopper_forward", "forward")
    out = np.full(size, np.nan, np.float32)
    launch(kernel, grid, Pointer(out, dtype="bf16"), ..., Descriptor(k, (1, 1, 64, 64)), ..., BLOCK_K=64)

The kernel's modules are executed with stand-ins for those of Gluon. Partitions of warp_specialize are
threads of which one runs at a time, in an order drawn from a seed; copies land as late as that order
says. A Fault is raised, whatever the order happens to be, for

    a tile that is read before its copy, or what a partition stored in it, was waited for;
    a tile that is written while it may still be read, a copy's or a product's reading included;
    a result that is used, or a tile that is given back, before the product was waited for;
    a product of what was stored without a fence;
    a barrier that gets more arrivals or bytes than it was told of; a wait that nobody will end;
    sums in global memory whose order is not fixed; reading or writing beyond a tensor.

What it does not know: layouts and swizzles, registers, what a compiler makes of it. Shared memory and
what is not written yet hold NaN. Values in 16 bits are kept as fp32 rounded to them; products add up
in fp32 as NumPy does.

values.py: numbers and pointers; tiles.py: shared memory; schedule.py: who goes on; machine.py: what
can be done; stand_ins.py: under which names; launching.py: of which source.
"""

from gluon_simulator.launching import Kernel, launch
from gluon_simulator.machine import Machine
from gluon_simulator.tiles import Descriptor
from gluon_simulator.values import Fault, Pointer, Tensor, rounded

__all__ = ["Descriptor", "Fault", "Kernel", "Machine", "Pointer", "Tensor", "launch", "rounded"]
