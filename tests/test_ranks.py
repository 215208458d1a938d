"""The helper that runs functions on gloo ranks: results, failures that name the rank, time-outs, recovery."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_cases, run_ranks


def add_ranks(value: int) -> tuple[int, int]:
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return os.getpid(), int(total)


def raise_on(bad_rank: int) -> int:
    if dist.get_rank() == bad_rank:
        raise ValueError(f"no rows on {bad_rank}")
    dist.barrier()
    return dist.get_rank()


def sleep_on(slow_rank: int, seconds: float) -> None:
    if dist.get_rank() == slow_rank:
        time.sleep(seconds)


def leave_on(dead_rank: int) -> None:
    if dist.get_rank() == dead_rank:
        os._exit(7)
    dist.barrier()


def threads() -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_answers_in_order(world_size: int) -> None:
    results = run_ranks(add_ranks, world_size, 10)
    assert [total for _, total in results] == [sum(10 + rank for rank in range(world_size))] * world_size
    assert len({process for process, _ in results}) == world_size


def test_workers_stay_for_the_next_call_and_use_one_thread() -> None:
    first = [process for process, _ in run_ranks(add_ranks, 2, 0)]
    assert [process for process, _ in run_ranks(add_ranks, 2, 0)] == first
    assert run_ranks(threads, 2) == [1, 1]


def test_fresh_workers_end_with_their_call() -> None:
    stay = [process for process, _ in run_ranks(add_ranks, 2, 0)]
    fresh = [process for process, _ in run_ranks(add_ranks, 2, 0, fresh=True)]
    assert not {*fresh} & {*stay}
    assert not any(Path(f"/proc/{process}").exists() for process in fresh)
    assert [process for process, _ in run_ranks(add_ranks, 2, 0)] == stay


def test_ranks_that_find_no_group_are_replaced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [process for process, _ in run_ranks(add_ranks, 2, 0)]
    monkeypatch.setattr("tests.ranks.JOIN_S", 2.0)
    os.kill(first[0], signal.SIGSTOP)  # a rank that never comes to the meeting
    second = run_ranks(add_ranks, 2, 0)
    assert [total for _, total in second] == [1, 1]
    assert not {process for process, _ in second} & set(first)


def test_cases_share_one_group() -> None:
    results = run_cases(add_ranks, 2, [(value,) for value in range(50)])
    assert [[total for _, total in case] for case in results] == [[2 * value + 1] * 2 for value in range(50)]


def test_failure_names_rank_and_case_and_keeps_the_workers() -> None:
    before = [process for process, _ in run_ranks(add_ranks, 3, 0)]
    with pytest.raises(RankError, match=r"rank 1 of 3 raised in case 2(.|\n)*ValueError: no rows on 1"):
        run_cases(raise_on, 3, [(-1,), (-1,), (1,), (-1,)])
    assert [process for process, _ in run_ranks(add_ranks, 3, 0)] == before


def test_timeout_names_the_silent_rank_and_where_it_stood_and_recovers() -> None:
    started = time.monotonic()
    where = r"rank 1 of 2 gave no answer to case 1 in 2 s(.|\n)*in sleep_on"
    with pytest.raises(RankError, match=where) as error:
        run_cases(sleep_on, 2, [(1, 0.0), (1, 60.0)], timeout_s=2.0)
    assert "rank 0" not in str(error.value)
    assert time.monotonic() - started < 30
    assert [total for _, total in run_ranks(add_ranks, 2, 1)] == [3, 3]


def test_a_dead_rank_is_named_and_replaced() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 died in case 0: exit code 7"):
        run_ranks(leave_on, 2, 1)
    assert [total for _, total in run_ranks(add_ranks, 2, 1)] == [3, 3]


def raise_while_the_other_sleeps() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no rows")
    time.sleep(60)


def test_a_rank_that_hangs_after_another_failed_is_replaced() -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match=r"\Arank 1 of 2 raised in case 0(.|\n)*ValueError: no rows"):
        run_ranks(raise_while_the_other_sleeps, 2)
    assert time.monotonic() - started < 30
    assert [total for _, total in run_ranks(add_ranks, 2, 1)] == [3, 3]


def test_a_local_function_is_refused_before_any_rank_runs() -> None:
    with pytest.raises((AttributeError, TypeError), match=r"local|pickle"):
        run_ranks(lambda: None, 2)
