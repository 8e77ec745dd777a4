"""The device to draw on: the one asked for, if it is there."""

import torch


def check_cuda_graph(wanted: bool, device: torch.device) -> None:
    if wanted and device.type != "cuda":
        raise ValueError(
            f"cuda_graph must be False on {device}, got True: only a CUDA device records its "
            "launches; leave it out"
        )


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is. ValueError when it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {str(device)!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device must be there, got {str(device)!r}, but PyTorch finds no CUDA device; "
            "use --device cpu, or install a CUDA build of torch"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device must be below cuda:{count}, got {str(device)!r}")
    return chosen
