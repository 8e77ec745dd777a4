"""Whether variants of a model compute the same, and what they must compute."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from torch import Tensor

from bench.measure.case import NOT_COMPARED, Ready, Verdict
from bench.workloads.operators import OPERATORS
from pixart.model.blocks import SelfAttention


def compare(
    ready: Mapping[str, Ready],
    truth: Callable[[str], tuple[str, Tensor | None]],
    unchanged: Mapping[str, str],
    bound: float,
) -> dict[str, Verdict]:
    """Each variant's result with what it must be, and that of one which was compiled, recorded or
    patched also with the same model's as it was built.

    truth(name): whose result it must have, and that; None where nobody could compute it: then nobody
    knows whether a variant is right, but for those that differ from their own model. unchanged: the
    names of those models. bound: on relative errors.
    """
    verdicts = {}
    for name, one in ready.items():
        against, expected = truth(name)
        plain = unchanged.get(name)
        beside = {}
        if plain is not None and plain in ready:
            beside = {plain: distance(one.result, ready[plain].result)}
        errors = {} if expected is None else {"out0": distance(one.result, expected)}
        agrees = all(error <= bound for error in (*errors.values(), *beside.values()))
        if expected is None:
            verdicts[name] = Verdict({}, NOT_COMPARED, None if agrees else False, beside)
        else:
            verdicts[name] = Verdict(errors, against, agrees, beside)
    return verdicts


def distance(made: Tensor, expected: Tensor) -> float:
    """Relative error of the norm; infinite where anything is not finite."""
    error = float((made.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else math.inf


@contextmanager
def eager_operators() -> Iterator[None]:
    """Models of ours take each operator's reference, and project before they compress."""
    models = [module for name, module in sys.modules.items() if name.startswith("pixart.model")]
    with ExitStack() as stack:
        for operator in OPERATORS.values():
            for module in models:
                if getattr(module, operator.name, None) is operator.ours:
                    stack.enter_context(patch.object(module, operator.name, operator.reference))
        stack.enter_context(patch.object(SelfAttention, "_folds", return_value=False))
        yield
