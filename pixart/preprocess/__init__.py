"""From a picture to what a ControlNet goes by: edges, depth, poses."""

from pixart.preprocess.preprocessors import (
    PREPROCESSORS,
    Preprocessor,
    networks_of,
    open_preprocessor,
    parse_places,
    preprocess,
)

__all__ = [
    "PREPROCESSORS",
    "Preprocessor",
    "networks_of",
    "open_preprocessor",
    "parse_places",
    "preprocess",
]
