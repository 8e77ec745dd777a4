"""Numbers of a scheduler_config.json, checked before anything is made of them."""

import math
from collections.abc import Mapping
from typing import Any

MOST_TIMESTEPS = 100_000
# What lies beyond is a damaged file, whatever the class: least and most, both included.
_INTEGERS = {
    "num_train_timesteps": (1, MOST_TIMESTEPS),
    "original_inference_steps": (1, MOST_TIMESTEPS),
    "steps_offset": (0, MOST_TIMESTEPS),
    "solver_order": (1, 3),
    "predictor_order": (1, 4),
    "corrector_order": (0, 4),
}
_NUMBERS = {
    "beta_start": (1e-9, 0.9999),
    "beta_end": (1e-9, 0.9999),
    "shift": (1e-3, 1e3),
    "flow_shift": (1e-3, 1e3),
    "snr_shift_scale": (1e-3, 1e3),
    "shift_terminal": (1e-6, 1e3),
    "base_shift": (1e-3, 1e3),
    "max_shift": (1e-3, 1e3),
    "timestep_scaling": (1e-3, 1e6),
    "sigma_min": (1e-9, 1e6),
    "sigma_max": (1e-9, 1e6),
    "sigma_data": (1e-9, 1e6),
    "rho": (1e-3, 1e3),
    "clip_sample_range": (1e-6, 1e6),
    "sample_max_value": (1e-6, 1e6),
    "dynamic_thresholding_ratio": (1e-6, 1.0),
}
_MAY_BE_NONE = ("sigma_min", "sigma_max", "shift_terminal")


def check_numbers(config: Mapping[str, Any]) -> None:
    """ValueError for the first number of a scheduler's configuration that none can draw with."""
    for name, value in config.items():
        if name in _INTEGERS or (name in _NUMBERS and not _is_left_out(name, value)):
            _check_limits(name, value)
        elif name == "lambda_min_clipped" and value == -math.inf:  # clips nothing, its default
            continue
        elif name == "lambda_min_clipped" and (
            isinstance(value, bool) or not isinstance(value, int | float)
        ):
            raise ValueError(f"{name} must be a number, got {value!r:.60}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    start, end = config.get("beta_start"), config.get("beta_end")
    if start is not None and end is not None and start > end:
        raise ValueError(f"beta_end must be at least beta_start, {start}, got {end}")
    if config.get("trained_betas") is not None:
        _check_betas(config["trained_betas"], config.get("num_train_timesteps", 1000))


def _is_left_out(name: str, value: object) -> bool:
    # Later diffusers write false for a sigma that is left out: its own annotation is bool.
    return name in _MAY_BE_NONE and (value is None or value is False)


def _check_limits(name: str, value: Any) -> None:
    least, most = _INTEGERS.get(name) or _NUMBERS[name]
    kinds, kind = ((int,), "an integer") if name in _INTEGERS else ((int, float), "a number")
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        raise ValueError(f"{name} must be {kind} from {least:g} to {most:g}, got {value!r:.60}")


def _check_betas(betas: Any, count: int) -> None:
    if not isinstance(betas, list | tuple) or len(betas) != count:
        size = len(betas) if isinstance(betas, list | tuple) else repr(betas)[:60]
        raise ValueError(f"trained_betas must be {count} numbers, got {size}")
    for index, beta in enumerate(betas):
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 < beta < 1:
            raise ValueError(f"trained_betas must be between 0 and 1, got {beta!r:.60} at {index}")
