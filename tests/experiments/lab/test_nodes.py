"""Nodes of the lab: what passes between them, what holds it back, and that nothing of it outlives its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashcp.experiments.lab import nodes as lab
from flashcp.experiments.lab.machine import LOCK, LabError, Quotas
from flashcp.experiments.lab.nodes import Link, Node, built_nodes, check_reach, remove_leftovers, sent_bytes

pytestmark = pytest.mark.usefixtures("turn")

RATE = Link(0.02)  # GB/s: 2 MB take 0.1 s
SENT = 2_000_000  # bytes
RECEIVE = """
import socket
with socket.create_server(("0.0.0.0", 9000)) as server:
    print("ready", flush=True)
    peer, _ = server.accept()
    total = 0
    while data := peer.recv(1 << 16):
        total += len(data)
    print(total)
"""
SEND = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 9000), timeout=float(sys.argv[3])) as peer:
    begun = time.perf_counter()
    peer.sendall(bytes(int(sys.argv[2])))
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)
    print(time.perf_counter() - begun)
"""
BUILD = """
import signal, subprocess, sys, time
from flashcp.experiments.lab.nodes import Link, built_nodes
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
with built_nodes(2, 1, Link(0.02), 1.0) as nodes:
    rank = nodes[1].quotas.enter + ["sleep", "1000"]
    subprocess.Popen(nodes[1].command(["env", "RANK=1", *rank]))
    time.sleep(0.5)
    print("ready", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def pair() -> Iterator[list[Node]]:
    with built_nodes(2, 2, RATE, 1.0) as nodes:
        yield nodes


def left() -> list[str]:
    """Whatever bears the lab's name."""
    listed = subprocess.run("ip netns list; ip -o link", shell=True, capture_output=True, text=True, check=True)
    names = [line for line in listed.stdout.splitlines() if lab.NAME in line or lab.SWITCH in line]
    groups = [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{lab.NAME}")]
    return names + groups


def is_gone(process: int) -> bool:
    """Whether it has ended, fetched by its parent or not."""
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def transfer(sender: Node, receiver: Node, count: int = SENT, patience_s: float = 20.0) -> float:
    """Seconds until so many bytes have come. Raises CalledProcessError where they cannot."""
    python = sys.executable
    with subprocess.Popen(receiver.command([python, "-c", RECEIVE]), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline() == "ready\n"
            arguments = [python, "-c", SEND, receiver.address, str(count), str(patience_s)]
            sent = subprocess.run(sender.command(arguments), capture_output=True, text=True, check=True)
            assert server.stdout.readline() == f"{count}\n"
        finally:
            server.kill()
    return float(sent.stdout)


def test_a_node_has_a_name_and_memory_of_its_own(pair: list[Node]) -> None:
    show = ["sh", "-c", "hostname; touch /dev/shm/mine; ls /dev/shm"]
    said = [subprocess.run(node.command(show), capture_output=True, text=True, check=True).stdout for node in pair]
    assert said == ["flashcp-lab-0\nmine\n", "flashcp-lab-1\nmine\n"]
    assert not Path("/dev/shm/mine").exists()


def test_a_link_carries_its_rate_and_no_more_and_counts_what_it_carries(pair: list[Node]) -> None:
    before = sent_bytes(0)
    assert transfer(*pair) >= 0.9 * SENT / (1e9 * RATE.gbps)
    assert SENT < sent_bytes(0) - before < 1.05 * SENT


def test_a_node_pays_nothing_for_what_stays_on_it(pair: list[Node]) -> None:
    before = sent_bytes(0)
    transfer(pair[0], pair[0])
    assert sent_bytes(0) - before < 0.01 * SENT


def test_a_link_can_be_slowed_and_cut_and_joined(pair: list[Node]) -> None:
    pair[1].shape(0.1 * RATE.gbps)
    assert transfer(*pair) >= 0.9 * SENT / (1e8 * RATE.gbps)
    pair[1].cut()
    with pytest.raises(subprocess.CalledProcessError):
        transfer(*pair, patience_s=1.0)
    pair[1].join()
    transfer(*pair, count=1000)


def test_a_rank_gets_its_share_of_a_core(pair: list[Node]) -> None:
    spin = "import time; end = time.time() + 2\nwhile time.time() < end: pass\nprint(time.process_time())"
    rank = [*pair[0].quotas.enter, sys.executable, "-c", spin]
    said = subprocess.run(pair[0].command(["env", "RANK=3", *rank]), capture_output=True, text=True, check=True)
    assert pair[0].quotas.cores == 0.25
    assert float(said.stdout) < 0.3 * 2 + 0.1


def test_the_end_leaves_nothing_whatever_ran(pair: list[Node]) -> None:
    still = subprocess.Popen(pair[0].command(["sleep", "1000"]))
    time.sleep(0.2)
    assert left()
    remove_leftovers()
    assert still.wait(10) == -signal.SIGKILL
    assert not left()


def test_an_error_leaves_nothing() -> None:
    with pytest.raises(ZeroDivisionError), built_nodes(2, 1, RATE, 1.0):
        raise ZeroDivisionError
    assert not left()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_an_interrupted_lab_leaves_is_gone_at_the_next(ending: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as builder:
        assert builder.stdout is not None
        try:
            assert builder.stdout.readline() == b"ready\n"
            with pytest.raises(LabError, match=f"another lab runs on this machine: process {builder.pid}"):
                built_nodes(1, 1, RATE, 1.0).__enter__()
            sleeper = int(next(Path("/sys/fs/cgroup").glob(f"*/{lab.NAME}/rank1/cgroup.procs")).read_text())
            os.kill(builder.pid, ending)
            builder.wait(20)
        finally:
            builder.kill()
    assert bool(left()) == (ending == signal.SIGKILL)
    with built_nodes(1, 1, RATE, 1.0):
        assert is_gone(sleeper)
    assert not left()


def test_what_a_killed_lab_left_can_be_removed_without_another() -> None:
    clean = [sys.executable, "-m", "flashcp.experiments.lab.nodes"]
    with subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as builder:
        assert builder.stdout is not None
        try:
            assert builder.stdout.readline() == b"ready\n"
            refused = subprocess.run(clean, capture_output=True, text=True, check=False)
            assert refused.returncode == 1
            assert refused.stderr == f"error: another lab runs on this machine: process {builder.pid}\n"
        finally:
            builder.kill()
    assert left()
    subprocess.run(clean, check=True)
    assert not left()
    assert LOCK.read_text() == ""


def test_a_second_ctrl_c_does_not_disturb_the_end() -> None:
    with subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as builder:
        assert builder.stdout is not None
        try:
            assert builder.stdout.readline() == b"ready\n"
            for _ in range(4):
                builder.send_signal(signal.SIGINT)
                time.sleep(0.02)
            builder.wait(20)
            assert not left()
        finally:
            builder.kill()


def test_namespaces_of_others_stay(pair: list[Node]) -> None:
    names = (f"{lab.NAME}-mine", f"{lab.NAME}-1x")
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        remove_leftovers()
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert {line.split()[0] for line in listed.splitlines() if lab.NAME in line} == {*names}
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def test_nodes_that_do_not_reach_each_other_are_no_lab(pair: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "PATIENCE_S", 0.5)
    check_reach(pair)
    pair[1].cut()
    with pytest.raises(LabError, match="a firewall may see them"):
        check_reach(pair)


def test_shares_too_small_for_the_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match="cores=1 for 40 ranks"):
        Quotas.make(lab.NAME, 40, 1.0)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), 1e3])
def test_rates_that_no_link_has_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="expected GB/s"):
        Link(rate)
