"""The operators, each with all that the benches know of it in one place: inputs, FLOPs and bytes, peers,
and the calls that are compared, tuned and compiled. Whatever iterates over operators does so here."""

from bench.workloads.operators import attention, compression, modulation
from bench.workloads.operators.workload import Operator, Workload

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for family in (attention, modulation, compression)
    for operator in family.OPERATORS
}

__all__ = ["OPERATORS", "Operator", "Workload"]
