"""Rows of features, before they are computed with."""

import numpy as np
import torch


def checked(features: np.ndarray, least: int = 1) -> np.ndarray:
    """ValueError unless they are (n, d), finite, and n is at least `least`."""
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"features must be rows (n, d), n at least {least}, got {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features must be finite, some are not")
    return features


def with_fp64(device: str | torch.device) -> torch.device:
    """Apple's GPUs have none."""
    place = torch.device(device)
    return torch.device("cpu") if place.type == "mps" else place
