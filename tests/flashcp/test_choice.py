"""`flashcp.choose`: the fastest of what it tried, as `flashcp.simulate` prices it; one line for what it cannot read."""

from __future__ import annotations

from typing import Any

import pytest

import flashcp
from flashcp.clusters import read_cluster
from flashcp.sharding.lengths import windows

PACKS = list(windows("pile", 32_768, 8, 5))
BATCHES = [PACKS[:4], PACKS[4:]]


def test_it_chooses_what_the_simulator_finds_fastest() -> None:
    choice = flashcp.choose(BATCHES, 16, kv_heads=8)
    names = [f"flashcp:h{h}:d{d}" for h in (1, 2, 4, 8) for d in (1, 2, 4) if 16 // d % h == 0]
    table = flashcp.simulate(PACKS, 16, kv_heads=8, batch_windows=4, methods=[*names, "flashcp"], plan_by="rows")
    tried = {(one.head_ranks, one.data_parallel): one for one in choice.candidates if one[1:3] == ("flashcp", "exact")}
    for name in names:
        one = table[name]
        same = [
            candidate.module_ms
            for candidate in choice.candidates
            if candidate[:5] == (one.head_ranks, "flashcp", "exact", one.data_parallel, "staged")
        ]
        assert same == [pytest.approx(one.module_ms)], name
    assert choice.best == min(choice.candidates, key=lambda one: one.module_ms)
    assert choice.head_ranks == table["flashcp"].head_ranks
    assert (choice.strategy, choice.exchange, choice.scope) == ("flashcp", "exact", "batch")
    assert {one.overlap for one in choice.candidates} == {"staged", "none"}  # never fused
    assert len(tried) >= len(names)


def test_what_is_settled_is_not_chosen() -> None:
    free = flashcp.choose(BATCHES, 16, kv_heads=8)
    settled = flashcp.choose(
        BATCHES, 16, kv_heads=8, strategy="contiguous", exchange="ring", data_parallel=2, overlap="none"
    )
    assert {one[1:5] for one in settled.candidates} == {("contiguous", "ring", 2, "none")}
    assert sorted(one.head_ranks for one in settled.candidates) == [1, 2, 4, 8]
    table = flashcp.simulate(PACKS, 16, kv_heads=8, batch_windows=4, overlap="none", methods=["contiguous+ring:d2:h4"])
    of_four = next(one for one in settled.candidates if one.head_ranks == 4)
    assert of_four.module_ms == pytest.approx(table["contiguous+ring:d2:h4"].module_ms)
    ring = flashcp.choose(BATCHES, 16, kv_heads=8, exchange="ring")
    assert {one[1:3] for one in ring.candidates} == {("per_document", "ring")}
    (ulysses,) = flashcp.choose(BATCHES, 16, exchange="ulysses", data_parallel=4, overlap="none").candidates
    assert (ulysses.head_ranks, ulysses.strategy) == (4, "flashcp")
    assert len(free.candidates) > len(ring.candidates) > len(settled.candidates)


def test_windows_of_fewer_tokens_than_ranks() -> None:
    """One plan has as many tokens as there are ranks, and so has each replica's."""
    choice = flashcp.choose([[[6], [3, 3], [6], [2, 4]]], 16)
    assert {one.data_parallel for one in choice.candidates} == {1, 2, 4}


def test_what_it_says() -> None:
    choice = flashcp.choose([[70_000, 40_000, 21_072]], 64, cluster=read_cluster("h100-ib-400g"))
    first, head, _, *lines = str(choice).splitlines()
    assert first.startswith(f"head_ranks={choice.head_ranks} strategy=flashcp exchange=exact overlap=")
    assert first.endswith("a window a batch, 64 ranks of h100-ib-400g")
    assert "a plan for each window: predicted" in first
    assert head.split() == ["head", "ranks", "strategy", "exchange", "data", "parallel", "overlap", "module", "ms"]
    assert len(lines) == len(choice.candidates)
    assert lines[0].split()[-1] == f"{choice.best.module_ms:.2f}"


def test_batches_of_arrays_and_of_iterators() -> None:
    lists = flashcp.choose([[pack.tolist() for pack in batch] for batch in BATCHES], 8)
    assert flashcp.choose((iter(batch) for batch in BATCHES), 8) == lists


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([], 8), r"batches=\[\]: expected document lengths, or windows of them"),
        ((["100"], 8), "a batch='100': expected document lengths, or windows of them"),
        (([[]], 8), r"a batch=\[\]: expected document lengths, or windows of them"),
        ((3, 8), "batches=3: expected document lengths, or windows of them"),
        (([[100, 0]], 8), r"document_lengths\[1\]=0: expected a whole number >= 1"),
        (([[[100], [100]], [[100]]], 2), "batches of 1, 2 windows: expected as many in every batch"),
        (([[100]], 0), "world_size=0: expected a whole number >= 1 and <= 1024"),
        (([[100]], 8, "h1000"), "cluster='h1000': expected one of a100-nvlink, "),
        (([[100]], 8, "h100-nvlink", 30, 8), "query_heads=30: expected a multiple of kv_heads=8"),
        (([[100]], 8, {"strategy": "zigzag"}), "strategy='zigzag': expected one of contiguous, "),
        (([[100]], 8, {"exchange": "smoke"}), "exchange='smoke': expected one of exact, "),
        (([[100]], 8, {"overlap": "never"}), "overlap='never': expected one of auto, none, staged, fused"),
        (([[[100]] * 4], 8, {"data_parallel": 3}), "data_parallel=3: expected one of 1, 2, 4, or none"),
        (([[100]], 3, {"exchange": "ulysses"}), r"flashcp\+ulysses: query_heads=32, kv_heads=8 cannot be shared out"),
    ],
)
def test_what_is_refused_in_one_line(given: tuple[Any, ...], message: str) -> None:
    *places, last = given
    with pytest.raises(ValueError, match=f"^{message}") as refused:
        flashcp.choose(*places, **last) if isinstance(last, dict) else flashcp.choose(*given)
    assert "\n" not in str(refused.value)
