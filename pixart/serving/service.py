"""What page and calls share: the queue, what may be asked of it, and who may ask, by which names."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pixart.serving.guarding.hosts import Hosts
from pixart.serving.limits import Limits
from pixart.serving.orders import JobQueue

if TYPE_CHECKING:
    from pixart.serving.guarding.clients import Clients


@dataclass(frozen=True)
class Offer:
    """What a client may choose by name; no request names a path or a URL. model: its name, as `/v1/models`
    has it. loras, controls: names of the service's lists. native: the side in pixels of the model's own
    square. multiple: of which heights and widths must be. fast: the plan that orders are drawn by unless
    they say otherwise, None for none."""

    model: str
    native: int
    multiple: int
    loras: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    fast: str | None = None


@dataclass(frozen=True)
class Service:
    queue: JobQueue
    offer: Offer
    clients: "Clients"
    limits: Limits = field(default_factory=Limits)
    hosts: Hosts = field(default_factory=Hosts)
