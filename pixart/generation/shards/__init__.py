"""Pictures by the million: tars of WebDataset, each drawn by one process, whole or not at all.

`plan` reads the list and says what is in which tar, `painter` draws one, `archive` writes it, `running` goes
over those that fall to this process.
"""

from typing import TYPE_CHECKING

from pixart.lazy import lazily

if TYPE_CHECKING:
    from pixart.generation.shards.painter import ShardPainter, ShardResult
    from pixart.generation.shards.plan import ShardPlan, ShardTask, plan_shards

__all__ = ["ShardPainter", "ShardPlan", "ShardResult", "ShardTask", "plan_shards"]


__getattr__ = lazily(
    __name__,
    dict.fromkeys(("ShardPainter", "ShardResult"), "pixart.generation.shards.painter")
    | dict.fromkeys(("ShardPlan", "ShardTask", "plan_shards"), "pixart.generation.shards.plan"),
)
