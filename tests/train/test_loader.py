"""The loader: every rank's rows of one pack, errors at the batch they concern, and a thread that ends."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import flashcp
from flashcp.options import planner
from flashcp.sharding.plan import ShardingPlan
from flashcp.train.data.documents import read_documents
from flashcp.train.data.loader import Batch, Loader, Share, of_plan
from flashcp.train.data.tokenizer import BytesTokenizer
from flashcp.train.data.windows import NO_LABEL, TokenWindow, pack_documents
from tests.train.test_documents import Parts

SOURCE = Parts(["first document", "the second, which is longer than the first", "3", "and the last one"])


def packs(context: int = 33, epochs: int = 4) -> Iterator[TokenWindow]:
    return pack_documents(read_documents(SOURCE, epochs), BytesTokenizer(), context, "carry")


def load(rank: int, world_size: int, windows: Iterator[TokenWindow], prefetch: int = 2) -> Loader:
    def make_plan(lengths: np.ndarray) -> ShardingPlan:
        return flashcp.plan(lengths, world_size, "per_document")

    return Loader(windows, make_plan, Share("exact", rank), prefetch)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "flashcp-loader"]


def test_ranks_share_out_each_pack() -> None:
    world_size = 3
    loaders = [load(rank, world_size, packs()) for rank in range(world_size)]
    windows = list(packs())
    batches: list[tuple[Batch, ...]] = list(zip(*loaders, strict=True))
    assert len(batches) == len(windows) > 5
    for window, shares in zip(windows, batches, strict=True):
        tokens, labels, positions = (np.full(33, -1) for _ in range(3))
        for rank, share in enumerate(shares):
            rows = share.plan.rows(rank)
            tokens[rows], labels[rows], positions[rows] = share.tokens, share.labels, share.position_ids
        np.testing.assert_array_equal(tokens, window.tokens)
        np.testing.assert_array_equal(labels, window.labels)
        expected = np.concatenate([np.arange(length) for length in window.document_lengths])
        np.testing.assert_array_equal(positions, expected)
        assert {share.plan.fingerprint for share in shares} == {shares[0].plan.fingerprint}
        assert {share.labelled for share in shares} == {int((window.labels != NO_LABEL).sum())}
        rows = shares[0].plan.route("exact").critical_rows
        assert shares[0].planned.critical_rows == rows >= shares[0].planned.critical_rows_bound
        assert shares[0].position == window.position


def test_replicas_share_out_the_windows_of_a_batch() -> None:
    """Six windows for two replicas of two ranks: three each, one pack for each replica's plan."""

    def make_plan(lengths: np.ndarray) -> ShardingPlan:
        return flashcp.plan(lengths, 2, "per_document")

    windows = list(packs(epochs=20))
    batches = list(
        zip(
            *(
                Loader(packs(epochs=20), make_plan, Share("exact", rank, replica, 2), batch_windows=6)
                for replica in range(2)
                for rank in range(2)
            ),
            strict=True,
        )
    )
    assert len(batches) == len(windows) // 6 > 1
    assert len(windows) % 6
    for number, shares in enumerate(batches):
        mine = windows[6 * number : 6 * number + 6]
        for replica in range(2):
            own = mine[3 * replica : 3 * replica + 3]
            lengths = np.concatenate([window.document_lengths for window in own])
            tokens = np.full(99, -1)
            for share in shares[2 * replica : 2 * replica + 2]:
                np.testing.assert_array_equal(share.plan.document_lengths, lengths)
                tokens[share.plan.rows(int(share is shares[2 * replica + 1]))] = share.tokens
            np.testing.assert_array_equal(tokens, np.concatenate([window.tokens for window in own]))
        assert {share.labelled for share in shares} == {sum(window.labelled for window in mine)}
        assert {(share.size, share.documents) for share in shares} == {
            (198, sum(len(window.document_lengths) for window in mine))
        }
        assert shares[0].heaviness + shares[2].heaviness == pytest.approx(2)
        assert {share.carried for share in shares} == {sum(window.carried for window in mine)}
        assert {share.position for share in shares} == {mine[-1].position}


def test_plans_are_made_ahead_and_not_too_far() -> None:
    made = []

    def counted() -> Iterator[TokenWindow]:
        for window in packs(epochs=50):
            made.append(window)
            yield window

    with load(0, 1, counted(), prefetch=3) as loader:
        deadline = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(made) == 4  # three wait, one is in the thread's hand
        next(loader)
    assert not loader_threads()


def test_an_error_comes_with_the_batch_it_concerns() -> None:
    def broken() -> Iterator[TokenWindow]:
        windows = packs()
        yield next(windows)
        yield next(windows)
        raise ValueError("c.jsonl:3: not a line of JSON")

    with load(0, 2, broken(), prefetch=8) as loader:
        assert len(next(loader).tokens) == 17
        next(loader)
        with pytest.raises(ValueError, match=r"c\.jsonl:3"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)
    assert not loader_threads()


def test_closing_early_ends_the_thread() -> None:
    with load(0, 2, packs(epochs=0), prefetch=1) as loader:
        next(loader)
        assert loader_threads()
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(loader)


def test_workers_make_the_same_plans_and_end_with_the_loader() -> None:
    make_plan = planner({"name": "flashcp"}, 2)
    before = set(multiprocessing.active_children())  # other tests' ranks

    def broken() -> Iterator[TokenWindow]:
        yield from itertools.islice(packs(), 5)
        raise ValueError("c.jsonl:3: not a line of JSON")

    with Loader(broken(), make_plan, Share("exact", 1), workers=2) as loader:
        for expected in itertools.islice(Loader(packs(), make_plan, Share("exact", 1)), 5):
            batch = next(loader)
            assert batch.plan == expected.plan
            assert batch.tokens.equal(expected.tokens)
        with pytest.raises(ValueError, match=r"c\.jsonl:3"):
            next(loader)
    with Loader(packs(epochs=0), make_plan, Share("exact", 1), workers=1) as loader:
        next(loader)
        assert set(multiprocessing.active_children()) - before
    deadline = time.monotonic() + 20
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(multiprocessing.active_children()) - before
    assert not loader_threads()


def test_numbers_of_a_mix_are_means_over_its_layers() -> None:
    mixed = flashcp.plan((900, 60, 64), 4, layers=[(flashcp.Mask(), 1), (flashcp.Mask("window", 50), 3)])
    told = of_plan(mixed, "exact")
    rows = [mixed.route("exact", window=window).critical_rows for window in (None, 50)]
    assert told.critical_rows == (rows[0] + 3 * rows[1]) / 4 >= told.critical_rows_bound > 0
    assert told.imbalance == mixed.imbalance
    assert of_plan(mixed, "ulysses").imbalance == 1
