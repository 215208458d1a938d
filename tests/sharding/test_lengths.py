"""Sampled document lengths: the published numbers come back, streams repeat, bad input is refused."""

from __future__ import annotations

import numpy as np
import pytest

from flashcp.sharding.lengths import LENGTH_DATA, LONG_DOCUMENT, PILE, WLB_LLM, length_stream, sample_lengths, windows


@pytest.mark.parametrize("name", LENGTH_DATA)
def test_a_longer_sample_begins_with_the_shorter_one(name: str) -> None:
    sample = sample_lengths(name, 6000, seed=3)
    assert sample.dtype == np.int64
    assert sample.min() >= 1
    assert np.array_equal(sample[:10], sample_lengths(name, 10, seed=3))
    assert np.array_equal(sample[:10], [length for length, _ in zip(length_stream(name, 3), range(10), strict=False)])
    assert not np.array_equal(sample[:10], sample_lengths(name, 10, seed=4))


def test_wlb_llm_has_the_published_bins_and_mean() -> None:
    sample = sample_lengths("wlb_llm", 200_000, seed=0)
    edges = [0, *(longest for longest, _ in WLB_LLM)]
    shares = np.histogram(sample, np.array(edges) + 0.5)[0] / len(sample)
    np.testing.assert_allclose(shares, [share for _, share in WLB_LLM], atol=0.003)
    assert sample.mean() == pytest.approx(3962, rel=0.03)


def test_pile_has_the_mean_that_its_subsets_have() -> None:
    """Documents are drawn in proportion to share / mean: their mean is sum(share) / sum(share / mean)."""
    share, kib = np.array(list(PILE.values())).T
    expected = share.sum() / (share / kib).sum() * 1024 / 4
    assert sample_lengths("pile", 400_000, seed=0).mean() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("weight", [0.25, 4.0])
def test_long_document_weight_multiplies_the_odds_of_long_documents(weight: float) -> None:
    plain, weighted = (
        (sample_lengths("wlb_llm", 300_000, 1, long_document_weight=w) > LONG_DOCUMENT).mean() for w in (1.0, weight)
    )
    odds = weighted / (1 - weighted) / (plain / (1 - plain))
    assert odds == pytest.approx(weight, rel=0.1)


def test_sigma_spreads_without_moving_the_mean() -> None:
    narrow, wide = (sample_lengths("redpajama", 400_000, 2, sigma=sigma) for sigma in (0.2, 1.0))
    assert narrow.mean() == pytest.approx(wide.mean(), rel=0.03)
    assert np.median(narrow) > np.median(wide)


def test_windows_are_full() -> None:
    packs = list(windows("pile", 8192, 5, seed=0))
    assert [pack.sum() for pack in packs] == [8192] * 5


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("nope", 3, 0), {}, "data set 'nope': expected one of wlb_llm, pile, redpajama"),
        (("pile", 0, 0), {}, "count=0: expected a whole number >= 1"),
        (("pile", 3, 0), {"long_document_weight": 0.0}, "long_document_weight=0.0: expected a number > 0"),
        (("pile", 3, 0), {"sigma": float("nan")}, "sigma=nan: expected a number > 0"),
    ],
)
def test_bad_input(arguments: tuple[str, int, int], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_lengths(*arguments, **options)
