"""What every launcher needs from Triton. Imported by the kernel files and by nothing else."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton

from pixart_kernels.dispatch.registration import INTERPRETED

if INTERPRETED:
    from pixart_kernels.dispatch import interpreter  # needs NumPy, which torch and triton do not

    interpreter.correct_bfloat16()


def configurations(*configs: triton.Config) -> list[triton.Config]:
    """The list that a kernel is tuned over. The interpreter, which cannot time, gets the first."""
    return list(configs[:1]) if INTERPRETED else list(configs)


def architecture(device: torch.device) -> str:
    """What launchers choose kernels by: "sm_90", "gfx942", ..., or "interpreter"."""
    if INTERPRETED and device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def precision(dtype: torch.dtype) -> str:
    """How matrix products take their inputs: tf32 for fp32 ones if the caller's setting says so."""
    if dtype != torch.float32:
        return "ieee"  # of no consequence; and reading a setting that was made elsewhere can raise
    matmul = torch.backends.cuda.matmul
    allowed = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
    return "tf32" if allowed == "tf32" else "ieee"


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on this device: Triton takes the current one, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
