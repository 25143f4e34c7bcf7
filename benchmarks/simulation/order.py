"""What the simulation's parts share: an order on its way, what a node sees of all else, what is counted. Here and only here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from benchmarks.simulation.clock import Clock
from benchmarks.simulation.links import Links
from benchmarks.simulation.origin import Origin
from benchmarks.simulation.roster import Roster
from benchmarks.simulation.weather import Weather
from manta.fetch.scheduler import Want
from manta.fetch.stragglers import Course
from manta.model.ids import BlobId

if TYPE_CHECKING:
    from benchmarks.simulation.node import Node


@dataclass(frozen=True, slots=True)
class Policy:
    """What of the policy is a setting."""

    swarm: bool = True
    """Off: every node gets everything from the origin."""
    slots: int = 8
    downloads: int = 8
    connections: int = 16
    """To the origin, at most."""
    fill: bool = True


class Swarm(Protocol):
    """What a node sees of everything else."""

    clock: Clock
    links: Links
    origin: Origin
    weather: Weather
    policy: Policy
    roster: Roster
    nodes: list[Node]
    files: dict[BlobId, int]
    """The model's files in the order in which they are read, and how many chunks each has."""
    look_s: float
    """The least time between two looks of a node at what to order."""

    def size_of(self, want: Want) -> int: ...

    def apart(self, one: int, other: int) -> bool:
        """Whether a partition lies between them."""
        ...

    def carry(
        self, source: int, target: int, size: float, cap: float, done: Callable[[Order], None], order: Order
    ) -> int:
        """Bytes flow, then `done` is called; returns the flow's number. `source` is len(nodes) for the origin."""
        ...

    def drop(self, flow: int) -> float:
        """The flow ends. Returns the bytes that did not come."""
        ...

    def completed(self, node: Node) -> None: ...


@dataclass(eq=False, slots=True)
class Order:
    """One chunk under way to `taker`, from `giver`, or from the origin where that is None."""

    want: Want
    taker: Node
    giver: Node | None
    pull: bool
    began: float
    flow: int | None = None
    first: float = 0.0
    """When its bytes began to flow."""
    course: Course = field(init=False)
    over: bool = False

    def __post_init__(self) -> None:
        self.course = Course(self.began, self.taker.swarm.size_of(self.want))


@dataclass(slots=True)
class Counts:
    """What a node did, in all its lives. Bytes and numbers."""

    from_origin: float = 0.0
    from_peers: float = 0.0
    to_peers: float = 0.0
    wasted: float = 0.0
    """Bytes of transfers that broke off."""
    asked: int = 0
    """Requests to members."""
    busy: int = 0
    """Their answers that there is no slot; that they do not have it; that they are fetching it; and none."""
    lacked: int = 0
    held: int = 0
    failed: int = 0
    looks: int = 0
    slots_most: int = 0
    """Slots that were in use at a time."""
    crashes: int = 0
    began_at: float = 0.0
    done_at: float | None = None
