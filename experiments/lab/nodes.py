"""Nodes of an emulated cluster: network namespaces joined by a switch, each behind a link of a chosen rate.

A node has a host name, an address (`eth0`), a /dev/shm and a loopback of its own. What its ranks send each other stays
on the loopback; what goes to another node passes two token buckets, on the way out of its node and into the other. The
switch, a bridge without an address, is out of reach of the machine's own network.

One lab runs at a time, for it holds a lock. So whatever bears the lab's name when it starts was left by one that could
not clean up, and is removed first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flashcp.experiments.lab.machine import LabError, Quotas, ended_by_signals, lock, undisturbed

NAME = "flashcp-lab"
SWITCH = "fcplab"  # a network device has 15 letters at most
TOOLS = ("ip", "tc", "nsenter", "unshare", "mount", "hostname")
MOST_NODES = 250  # addresses of a /24
MTU = 9000  # bytes: headers are under 1% of what is sent
LONGEST_QUEUE = 64 << 20
"""Bytes that wait at a bucket: more than all connections of a node have under way, so that none is dropped."""


OURS = re.compile(rf"{NAME}-[0-9]+|{SWITCH}[0-9]*")
"""Names of what a lab makes; somebody else's `flashcp-lab-mine` is left alone."""
PATIENCE_S = 5.0  # for an answer from another node
REACH = """
import errno, socket, sys
with socket.socket() as peer:
    peer.settimeout(float(sys.argv[2]))
    sys.exit(peer.connect_ex((sys.argv[1], 9)) != errno.ECONNREFUSED)
"""
"""Nobody listens there: a node that is reached says so."""


@dataclass(frozen=True)
class Link:
    """A node's link, the same in both directions.

    gbps: GB/s. delay_us: on the way out of a node; more than 0 needs the kernel's netem.
    """

    gbps: float
    delay_us: float = 0.0

    def __post_init__(self) -> None:
        if not 1e-4 <= self.gbps <= 100:
            raise ValueError(f"gbps={self.gbps!r}: expected GB/s from 0.0001 to 100")
        if not 0 <= self.delay_us <= 1e6:
            raise ValueError(f"delay_us={self.delay_us!r}: expected microseconds from 0 to 1e6")


@dataclass(frozen=True)
class Node:
    """A node. address: of its `eth0`. port: the switch's end of its link, a device of this machine."""

    index: int
    link: Link
    quotas: Quotas

    @property
    def name(self) -> str:
        return f"{NAME}-{self.index}"

    @property
    def address(self) -> str:
        return f"10.77.0.{self.index + 1}"

    @property
    def port(self) -> str:
        return port_of(self.index)

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The arguments as a command that runs on the node. `ip netns exec` would hide the control groups."""
        set_up = 'echo $$ > "$1" && hostname "$0" && mount -t tmpfs tmpfs /dev/shm && shift && exec "$@"'
        own_names = ["unshare", "--uts", "--mount", "sh", "-c", set_up, self.name, str(self.quotas.agents)]
        return ["nsenter", f"--net=/run/netns/{self.name}", *own_names, *arguments]

    def shape(self, gbps: float) -> None:
        """Let the link carry so many GB/s from now on."""
        _shape(["-n", self.name], "eth0", gbps, "change")
        _shape([], self.port, gbps, "change")

    def cut(self) -> None:
        """Unplug the node from the switch; its ranks are not told."""
        _run("ip", "link", "set", self.port, "down")

    def join(self) -> None:
        """Plug it in again."""
        _run("ip", "link", "set", self.port, "up")


def port_of(node: int) -> str:
    return f"{SWITCH}{node}"


def sent_bytes(node: int) -> int:
    """What has left a node so far, with the headers of Ethernet, IP and TCP.

    The switch's end of a link is seen from every node, for they share /sys.
    """
    return int(Path(f"/sys/class/net/{port_of(node)}/statistics/rx_bytes").read_text())


@contextmanager
def built_nodes(count: int, ranks_per_node: int, link: Link, cores: float) -> Iterator[list[Node]]:
    """Build nodes and remove them at the end, with every process on them.

    cores: of all ranks together, in equal shares. Raises LabError where they cannot be built.
    """
    if not 1 <= count <= MOST_NODES:
        raise ValueError(f"nodes={count}: expected 1 to {MOST_NODES}")
    check_tools()
    with lock(), ended_by_signals():
        remove_leftovers()
        try:
            nodes = _build_all(count, ranks_per_node, link, cores)
            check_reach(nodes)
            yield nodes
        finally:
            with undisturbed():
                remove_leftovers()


def _build_all(count: int, ranks_per_node: int, link: Link, cores: float) -> list[Node]:
    try:
        quotas = Quotas.make(NAME, count * ranks_per_node, cores)
    except OSError as error:
        raise LabError(f"the lab needs what this machine refuses: {error}") from error
    _run("ip", "link", "add", SWITCH, "type", "bridge")
    _run("ip", "link", "set", SWITCH, "up")
    nodes = [Node(index, link, quotas) for index in range(count)]
    for node in nodes:
        _build(node)
    return nodes


def _build(node: Node) -> None:
    _run("ip", "netns", "add", node.name)
    _run("ip", "link", "add", node.port, "mtu", str(MTU), "type", "veth", "peer", "eth0", "mtu", str(MTU), "netns",
         node.name)  # fmt: skip
    _run("ip", "link", "set", node.port, "master", SWITCH, "up")
    inside = ["-n", node.name]
    _run("ip", *inside, "address", "add", f"{node.address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _run("ip", *inside, "link", "set", device, "up")
    _shape(inside, "eth0", node.link.gbps, "add")
    _shape([], node.port, node.link.gbps, "add")
    if node.link.delay_us:
        _run("tc", *inside, "qdisc", "add", "dev", "eth0", "parent", "1:", "netem", "delay", f"{node.link.delay_us}us",
             "limit", "100000")  # fmt: skip


def _shape(where: Sequence[str], device: str, gbps: float, verb: str) -> None:
    """A token bucket at a device: 2 ms of tokens, and at least the largest packet that leaves in one piece."""
    burst = max(1 << 17, round(2e-3 * 1e9 * gbps))
    bucket = ["tbf", "rate", f"{round(8e9 * gbps)}bit", "burst", str(burst), "limit", str(LONGEST_QUEUE)]
    _run("tc", *where, "qdisc", verb, "dev", device, "root", "handle", "1:", *bucket)


def check_reach(nodes: Sequence[Node]) -> None:
    """Raise LabError where what the last node sends the first does not come."""
    first, last = nodes[0], nodes[-1]
    patience_s = PATIENCE_S + 4e-6 * last.link.delay_us
    enter = ["nsenter", f"--net=/run/netns/{last.name}"]
    command = [*enter, sys.executable, "-c", REACH, first.address, str(patience_s)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise LabError(
            "the lab needs a bridge that carries packets, and here they are lost: a firewall may see them (Docker's "
            "does); `sysctl net.bridge.bridge-nf-call-iptables=0` keeps it from bridges"
        )


def remove_leftovers() -> None:
    """Remove everything that bears the lab's name: processes, control groups, namespaces, links, the switch.

    Raises LabError at the end where a part cannot be removed; the others are."""
    left = ""
    try:
        Quotas.remove(NAME)
    except OSError as error:
        left = f"a process of an earlier lab does not end, or its control group stays: {error}"
    for entry in json.loads(_run("ip", "-json", "netns", "list") or "[]"):
        if OURS.fullmatch(entry["name"]):
            _run("ip", "netns", "delete", entry["name"])
    # A namespace takes its links along, but in its own time.
    for entry in json.loads(_run("ip", "-json", "link", "show") or "[]"):
        if OURS.fullmatch(entry["ifname"]):
            subprocess.run(["ip", "link", "delete", entry["ifname"]], capture_output=True, check=False)
    if left:
        raise LabError(left)


def check_tools() -> None:
    """Raise LabError, naming it, where a tool or a right is missing."""
    if os.geteuid() != 0:
        raise LabError("the lab needs root: it makes network namespaces and control groups")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise LabError(f"the lab needs {', '.join(missing)}: install iproute2, util-linux and hostname")


def _run(*command: str) -> str:
    """Raises LabError with the tool's own words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LabError(f"the lab needs `{' '.join(command)}`, which says: {said}")
    return done.stdout


def main() -> int:
    """Remove what a lab that was killed has left. Exit code 0; 1, with one line, where another one runs."""
    try:
        check_tools()
        with lock():
            remove_leftovers()
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
