"""A switch with nodes and an origin around it, each in a namespace of its own behind a link of its own rate, here and only here.

    with network(4, rate=200_000_000) as net:
        hub = HubProcess(spec, prefix=net.origin.command([]), host=net.origin.address)
        net.nodes[0].popen([...])
        net.cut(net.nodes[2]); net.mend(net.nodes[2]); net.set_rate(net.origin, 0)

The switch is a bridge in a namespace of its own, so nothing of it is in this one: no address, no route, and this machine's firewall and
the services that bind here have no part in it. Who is here talks to what runs in there by unix sockets. Each end of a link sends through
a token bucket (see `netns`): a node's own device, and the switch's port towards it; so a node sends at its rate and receives at its rate,
at once. Used by `manta.testing.cluster`. What is left of a killed owner goes with the next namespace that is made, whoever makes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_network

from manta.errors import Invalid
from manta.testing import netns

SUBNET = ip_network("198.19.255.0/24")
"""Every cluster's: none is connected to another, nor to this namespace. Of the same range as `netns.SUBNETS`."""

NODES_MAX = 200
ORIGIN_NUMBER = 254
BRIDGE = "switch"

_clusters = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host(netns.Place):
    """Something on the switch."""

    port: str
    """The switch's device towards it."""


@dataclass(frozen=True, slots=True)
class Network:
    switch: str
    """The name of the switch's namespace."""
    nodes: tuple[Host, ...]
    origin: Host

    def set_rate(self, host: Host, rate: int) -> None:
        """Bits per second that go over the host's link each way from now on, frames included; 0 is no limit."""
        netns.limit(host.name, netns.DEVICE, rate)
        netns.limit(self.switch, host.port, rate)

    def cut(self, host: Host) -> None:
        """Nothing goes to the host or comes from it until `mend`. It takes milliseconds."""
        netns.run("ip", "-n", self.switch, "link", "set", host.port, "down")

    def mend(self, host: Host) -> None:
        """After `cut`; of a link that is well, nothing happens."""
        netns.run("ip", "-n", self.switch, "link", "set", host.port, "up")


@contextmanager
def network(nodes: int, *, rate: int = 0, origin_rate: int = 0) -> Iterator[Network]:
    """A switch, `nodes` hosts behind links of `rate` bits per second each way (0: no limit), and an origin behind `origin_rate`.

    At the end, however it comes, everything that runs in it is ended, and all of it is gone. Raises Denied where none can be made.
    """
    if not 1 <= nodes <= NODES_MAX:
        raise Invalid(f"A cluster of {nodes} nodes was asked for: it takes 1 to {NODES_MAX}.")
    with ExitStack() as stack:
        stack.enter_context(netns.termination_unwinds())
        with netns.making():
            prefix = f"c{next(_clusters)}"
            switch = netns.owned_name(f"{prefix}switch")
            stack.callback(netns.remove, switch)
            _build_switch(switch)
            origin = _join(stack, switch, f"{prefix}origin", ORIGIN_NUMBER)
            hosts = tuple(_join(stack, switch, f"{prefix}n{number}", number) for number in range(1, nodes + 1))
        made = Network(switch, hosts, origin)
        made.set_rate(origin, origin_rate)
        for host in hosts:
            made.set_rate(host, rate)
        yield made


def _build_switch(name: str) -> None:
    netns.run("ip", "netns", "add", name)
    # Without spanning tree and multicast snooping a port forwards as soon as it is up, and knows nothing that could be out of date.
    netns.run("ip", "-n", name, "link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
    netns.run("ip", "-n", name, "link", "set", BRIDGE, "up")


def _join(stack: ExitStack, switch: str, what: str, number: int) -> Host:
    name, port = netns.owned_name(what), f"port{number}"
    stack.callback(netns.remove, name)
    netns.run("ip", "netns", "add", name)
    link = ["type", "veth", "peer", "name", netns.DEVICE, "netns", name]
    netns.run("ip", "-n", switch, "link", "add", port, "mtu", str(netns.MTU), *link)
    netns.run("ip", "-n", switch, "link", "set", port, "master", BRIDGE, "up")
    host = Host(name=name, address=str(SUBNET[number]), port=port)
    stack.callback(host.end)
    netns.connect(name, f"{host.address}/{SUBNET.prefixlen}")
    return host
