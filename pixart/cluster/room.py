"""How many workers a cluster has room for."""

from dataclasses import dataclass
from typing import Any

from pixart.cluster.connection import Cluster


@dataclass(frozen=True)
class Room:
    """Workers, and what each takes."""

    workers: int
    cpus: float
    gpus: float


def room_for(ray: Any, cluster: Cluster) -> Room:
    """ValueError for a cluster that has less than is asked for."""
    machines = machines_of(ray)
    gpus = cluster.gpus
    if gpus is None:
        gpus = 1.0 if any(machine.get("GPU", 0) for machine in machines) else 0.0
    cpus = cluster.cpus
    if cpus is None:
        largest = max((machine.get("CPU", 0) for machine in machines), default=0)
        least = min((machine["CPU"] for machine in machines if machine.get("CPU")), default=1)
        total = sum(machine.get("CPU", 0) for machine in machines)
        share = least if cluster.workers is None else min(largest, total // cluster.workers)
        cpus = 1.0 if gpus else max(1.0, share)
        # Machines of 3 CPUs have no room for workers of 2 each, though 2 go into the sum.
        while cluster.workers and cpus > 1 and fitting(machines, cpus, gpus) < cluster.workers:
            cpus -= 1
    most = fitting(machines, cpus, gpus)
    workers = cluster.workers or most
    if not 0 < workers <= most:
        there = f"{_sum(machines, 'CPU')} CPUs and {_sum(machines, 'GPU')} GPUs on {len(machines)} machines"
        each = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise ValueError(
            f"workers must be at most {most} in a cluster with {there}, got {max(workers, 1)} of {each} each; "
            "give fewer, or let machines join it first (ray start --address)"
        )
    return Room(workers, cpus, gpus)


def machines_of(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _sum(machines: list[dict[str, float]], kind: str) -> str:
    return f"{sum(machine.get(kind, 0) for machine in machines):g}"


def fitting(machines: list[dict[str, float]], cpus: float, gpus: float) -> int:
    """How many workers there is room for, were nobody else there."""
    return sum(
        int(min(machine.get("CPU", 0) / cpus, machine.get("GPU", 0) / gpus if gpus else 1e9))
        for machine in machines
    )
