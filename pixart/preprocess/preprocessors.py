"""Preprocessors: what a ControlNet was trained to go by, made of a picture.

    none    the picture itself: it is edges, a depth map or a pose already
    canny   thin edges (Canny 1986), white on black; thresholds 100 and 200, as usual with ControlNets
    hed     soft edges of the network that PixArt's ControlNet was trained with
    depth   near is bright, by a network of transformers
    pose    people's joints and limbs in OpenPose's colours, by two networks of transformers

    preprocess("canny", image)
    open_preprocessor("hed", {"hed": "ControlNetHED.pth"})(image)

Of networks each has a name, NETWORKS says where they are published, and `places` may name others.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pixart.files import CheckpointError, fingerprint, fingerprint_files
from pixart.weights import resolve

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

PREPROCESSORS = ("none", "canny", "hed", "depth", "pose")
CANNY_THRESHOLDS = (
    100,
    200,
)  # of the gradient: edges begin above the second, and go on to the first
# Networks by name, and where they are published: hub ids, or files of them.
NETWORKS = {
    "hed": "lllyasviel/Annotators/ControlNetHED.pth",
    "depth": "depth-anything/Depth-Anything-V2-Small-hf",
    "pose": "usyd-community/vitpose-base-simple",
    "person": "PekingU/rtdetr_r50vd_coco_o365",  # finds whose poses are taken
}
_FILES = ("*.json", "*.safetensors")  # of a repository; some hold the weights twice
_KEPT = 4  # opened preprocessors: that many controls a picture may have

Places = Mapping[str, str | Path]


@dataclass(frozen=True)
class Preprocessor:
    """Called with a picture, it gives an RGB picture of the same size. identity: differs where the
    result may, by its networks' weights too."""

    name: str
    identity: str
    draw: "Callable[[Image], Image]"

    @property
    def digest(self) -> str:
        """Of its networks' weights; "" for what has none."""
        return self.identity.removeprefix(self.name).strip() if networks_of(self.name) else ""

    def __call__(self, image: "Image") -> "Image":
        drawn = self.draw(image.convert("RGB"))
        assert drawn.mode == "RGB" and drawn.size == image.size
        return drawn


def preprocess(
    name: str,
    image: "Image",
    *,
    weights: Places | None = None,
    device: "torch.device | str | None" = None,
) -> "Image":
    """The picture as `name` makes it, RGB of the same size. Networks stay open for the next picture.

    name: one of PREPROCESSORS. weights: where networks are, by their names in NETWORKS; of others, and of
    None, it is what NETWORKS says. device: None is the CPU. Raises what open_preprocessor raises.
    """
    given = tuple(sorted((network, str(place)) for network, place in (weights or {}).items()))
    return _kept(name, given, str(device or "cpu"))(image)


@lru_cache(_KEPT)
def _kept(name: str, places: tuple[tuple[str, str], ...], device: str) -> Preprocessor:
    return open_preprocessor(name, dict(places), device)


def open_preprocessor(
    name: str, places: Places | None = None, device: "torch.device | str" = "cpu"
) -> Preprocessor:
    """A preprocessor with its networks, see `preprocess`. Raises ValueError for an unknown one,
    ModuleNotFoundError where a library is not installed, CheckpointError for networks that are not
    there or cannot be used."""
    if name not in PREPROCESSORS:
        raise ValueError(f"preprocessor must be one of {', '.join(PREPROCESSORS)}, got {name!r}")
    if name == "none":
        return Preprocessor(name, name, lambda image: image)
    if name == "canny":
        return _canny()
    make = {"hed": _hed, "depth": _depth, "pose": _pose}[name]
    return make(places or {}, device)


def networks_of(name: str) -> tuple[str, ...]:
    """The networks that a preprocessor has, by their names in NETWORKS; none for what is none."""
    return {"hed": ("hed",), "depth": ("depth",), "pose": ("pose", "person")}.get(name, ())


def parse_places(texts: Iterable[str]) -> dict[str, str]:
    """NAME=PLACE of networks, as options give them. Raises ValueError."""
    places = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if name not in NETWORKS or not equals or not place:
            known = ", ".join(f"{network}=PLACE" for network in NETWORKS)
            raise ValueError(f"weights of preprocessors must be {known}, got {text!r}")
        places[name] = place
    return places


def _canny() -> Preprocessor:
    if find_spec("cv2") is None:
        raise ModuleNotFoundError(
            "preprocessor canny needs: pip install opencv-python-headless; or make the edges yourself and "
            "take preprocessor none"
        )
    import cv2
    import numpy as np
    from PIL import Image

    def draw(image: "Image.Image") -> "Image.Image":
        # Of the three channels OpenCV takes the steepest at each pixel.
        edges = cv2.Canny(np.asarray(image), *CANNY_THRESHOLDS)
        return Image.fromarray(edges).convert("RGB")

    low, high = CANNY_THRESHOLDS
    return Preprocessor("canny", f"canny {low} {high}", draw)


def _hed(places: Places, device: "torch.device | str") -> Preprocessor:
    from pixart.preprocess.hed import draw_hed, open_hed

    path = _place("hed", places)
    return Preprocessor("hed", f"hed {_digest(path)}", partial(draw_hed, open_hed(path, device)))


def _depth(places: Places, device: "torch.device | str") -> Preprocessor:
    from pixart.preprocess.depth import draw_depth, open_depth

    folder = _place("depth", places)
    draw = partial(draw_depth, open_depth(folder, device))
    return Preprocessor("depth", f"depth {_digest(folder)}", draw)


def _pose(places: Places, device: "torch.device | str") -> Preprocessor:
    from pixart.preprocess.pose import draw_pose, open_pose

    pose, person = _place("pose", places), _place("person", places)
    draw = partial(draw_pose, open_pose(pose, person, device))
    return Preprocessor("pose", f"pose {_digest(pose)} {_digest(person)}", draw)


def _place(network: str, places: Places) -> Path:
    """A network's file or folder, from the hub or its cache where no path is given."""
    try:
        return resolve(places.get(network, NETWORKS[network]), allow_patterns=_FILES)
    except CheckpointError as error:
        raise CheckpointError(
            f"preprocessor needs the network {network}: {error} (--preprocessor-weights {network}=PATH)"
        ) from error


def _digest(path: Path) -> str:
    found = fingerprint(path) if path.is_dir() else fingerprint_files({"": path})
    return found[:16]
