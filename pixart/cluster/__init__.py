"""Work on the machines of a Ray cluster: items in, results out, in the order in which they end.

Plain actors of Ray, and not Ray Data, do it. Ray Data (`map_batches` with a class) begins with a data set
that is there as a whole, where items are read as workers become free; it gives a lost block back to its
pool as often as that is told in advance, whoever is at fault, where an item that kills every worker must end
the run with its name; it leaves a detached actor for statistics in the cluster; and it says what a worker
raised as a traceback of its own. Here all that is one loop over `ray.wait`.

Ray itself sends pickles from process to process, so whoever reaches a cluster's ports can run code on it:
it must be in a network that is trusted.
"""

from typing import TYPE_CHECKING

from pixart.lazy import lazily

if TYPE_CHECKING:
    from pixart.cluster.connection import Cluster
    from pixart.cluster.crew import LostItem, run_on_ray

__all__ = ["Cluster", "LostItem", "run_on_ray"]


__getattr__ = lazily(
    __name__,
    {
        "Cluster": "pixart.cluster.connection",
        "LostItem": "pixart.cluster.crew",
        "run_on_ray": "pixart.cluster.crew",
    },
)
