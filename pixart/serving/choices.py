"""What clients may choose by name: the LoRAs of a folder, and the ControlNets of the command line."""

import re
from collections.abc import Iterable
from pathlib import Path

from pixart.files import printable

# Names stand in prompts, <lora:NAME:WEIGHT>, in lists with commas, and in addresses.
_NAME = re.compile(r"[\w][\w. +@-]{0,99}")
_ADAPTERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # in folders


def find_loras(folder: Path) -> dict[str, Path]:
    """Names and places of the LoRAs in a folder, in order: .safetensors files, and folders that hold one;
    hidden ones are passed over. ValueError for a folder with none, and for a name that a prompt could not hold."""
    if not folder.is_dir():
        raise NotADirectoryError(f"--lora-folder must be a folder, got {printable(str(folder))}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # such as what macOS leaves beside each file: ._NAME
            continue
        if path.is_dir() and any((path / name).is_file() for name in _ADAPTERS):
            _add(found, path.name, path)
        elif path.suffix == ".safetensors" and path.is_file():
            _add(found, path.stem, path)
    if not found:
        raise ValueError(
            f"--lora-folder must hold .safetensors files or folders in peft's layout, got none in "
            f"{printable(str(folder))}"
        )
    return found


def parse_controls(texts: Iterable[str]) -> dict[str, str]:
    """NAME=PLACE of ControlNets, as options give them. Raises ValueError."""
    places: dict[str, str] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not equals or not place:
            raise ValueError(f"--control must be NAME=PLACE, got {text!r}")
        _check_name("--control", name)
        if name in places:
            raise ValueError(f"--control {name} must be given once, got {places[name]} and {place}")
        places[name] = place
    return places


def _add(found: dict[str, Path], name: str, path: Path) -> None:
    _check_name("--lora-folder", name)
    if name in found:
        raise ValueError(
            f"--lora-folder must have each name once, got {found[name].name} and {path.name}; rename one"
        )
    found[name] = path


def _check_name(option: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{option}: names must be letters, digits and . _ - + @ or spaces, up to 100, got "
            f"{printable(name)!r}; rename it"
        )
