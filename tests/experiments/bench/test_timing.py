"""How long work takes: rounds in turns, and a GPU that is kept busy until all of a round is launched."""

from __future__ import annotations

import time

import pytest
import torch

from flashcp.experiments.bench import harness as timing
from flashcp.experiments.bench.harness import in_turns_ms, rounds_in

CPU = torch.device("cpu")


def test_pieces_of_work_take_turns() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    times = in_turns_ms({"short": lambda: work("short", 0.001), "long": lambda: work("long", 0.02)}, CPU, 1e-9)
    assert order == ["short", "long"] * 4  # once to warm up
    assert 1 <= times["short"][0] <= times["short"][1] <= times["short"][2] < times["long"][1]


@pytest.mark.parametrize(("seconds", "round_s", "count"), [(4, 1, 4), (4, 100, 3), (4, 0, 50), (4, 0.001, 50)])
def test_rounds_fit_the_time(seconds: float, round_s: float, count: int) -> None:
    assert rounds_in(seconds, round_s) == count


def test_a_gpu_is_busy_before_each_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what is launched, noted instead of done: a measurement begins when all of it is in the queue."""
    order: list[str | int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, other: Event) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", order.append)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1)
    slow = lambda: (time.sleep(0.004), order.append("work"))  # noqa: E731
    assert timing._on_gpu({"": slow}, CPU, lambda round_s: 2)[""] == [2.0, 2.0]
    held = order[4]
    assert isinstance(held, int)
    assert held >= 2 * 0.004 * 1.98e9  # twice as long as the launch takes, at the highest clock
    one = [held, "event", "work", "event"]
    assert order == ["work", "wait", "work", "wait", *one, "wait", *one, *one, "wait"]
    order.clear()
    timing._on_gpu({"": lambda: order.append("work")}, CPU, lambda round_s: 1)
    assert order[4] == timing.CYCLES_PER_S * timing.HELD_S  # at least


@pytest.mark.gpu
def test_a_gpus_time_is_not_the_hosts() -> None:
    device = torch.device("cuda")
    x = torch.randn(64, 64, device=device)

    def slowly_launched() -> None:
        x.add_(1)
        time.sleep(0.002)
        x.add_(1)

    assert in_turns_ms({"": slowly_launched}, device, 1.0)[""][1] < 0.5
    y = torch.randn(2048, 2048, device=device)
    times = in_turns_ms({"small": lambda: y @ y, "large": lambda: [y @ y for _ in range(20)]}, device, 1.0)
    assert 0 < times["small"][0] <= times["small"][1] <= times["small"][2] < times["large"][1]
