"""A small Ray of a test module's own."""

from typing import Any


def start(**more: Any) -> None:
    """Join this process to a Ray that it starts, with two CPUs and little memory. RAY_worker_niceness should be 0
    in the environment: Ray takes 15 for workers, which then starve beside the rest of the suite."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        **more,
    )
