"""Document lengths of the data sets that context parallelism is planned for: published numbers, sampled.

wlb_llm: share of documents per length bin (the sample of WLB-LLM's distribution that circulates; arXiv 2503.17924),
uniform inside a bin. pile, redpajama: share and mean size per subset; only means are published, so a subset is
lognormal with that mean and `sigma` 1.0, its documents drawn in proportion to share / mean; 4 bytes a token.
RedPajama's shares are its token counts; its means are our estimates.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np

from flashcp.sharding.packing import pack_lengths
from flashcp.sharding.values import MOST_ITEMS, read_number, read_whole, shown

LONG_DOCUMENT = 32_768
"""Tokens above which `long_document_weight` applies."""
SIGMA = 1.0
"""Spread of a subset's lognormal: the standard deviation of the logarithm of a length."""
MOST_SIGMA = 8
"""Beyond it nearly all documents have one token, and some more than int64 holds."""
BYTES_PER_TOKEN = 4
Subsets = Mapping[str, tuple[float, float]]
BLOCK = 4096  # documents drawn at a time: a stream is the same however many of them are taken

# longest document of the bin in tokens, share of the documents in it
WLB_LLM = (
    (64, 0.01006),
    (128, 0.00970),
    (256, 0.02018),
    (512, 0.03921),
    (1024, 0.08037),
    (1536, 0.07946),
    (2048, 0.07835),
    (3072, 0.15764),
    (4096, 0.16191),
    (5120, 0.15731),
    (6144, 0.16127),
    (8192, 0.02084),
    (12288, 0.00790),
    (16384, 0.00246),
    (24576, 0.00304),
    (32768, 0.00147),
    (49152, 0.00217),
    (65536, 0.00138),
    (98304, 0.00320),
    (131072, 0.00211),
)

# subset: share of the bytes, mean document in KiB
PILE = {
    "Pile-CC": (18.11, 4.33),
    "PubMed Central": (14.40, 30.55),
    "Books3": (12.07, 538.36),
    "OpenWebText2": (10.01, 3.85),
    "ArXiv": (8.96, 46.61),
    "GitHub": (7.59, 5.25),
    "FreeLaw": (6.12, 15.06),
    "Stack Exchange": (5.13, 2.16),
    "USPTO": (3.65, 4.08),
    "PubMed Abstracts": (3.07, 1.30),
    "Gutenberg": (2.17, 398.73),
    "OpenSubtitles": (1.55, 30.48),
    "Wikipedia": (1.53, 1.11),
    "DM Mathematics": (1.24, 8.00),
    "Ubuntu IRC": (0.88, 545.48),
    "BookCorpus2": (0.75, 369.87),
    "EuroParl": (0.73, 68.87),
    "HackerNews": (0.62, 4.92),
    "YouTube Subtitles": (0.60, 22.55),
    "PhilPapers": (0.38, 73.37),
    "NIH ExPorter": (0.30, 2.11),
    "Enron": (0.14, 1.78),
}

# subset: tokens in billions, mean document in KiB
REDPAJAMA = {
    "CommonCrawl": (878, 6.0),
    "C4": (175, 2.0),
    "GitHub": (59, 5.2),
    "ArXiv": (28, 60.0),
    "Books": (26, 500.0),
    "Wikipedia": (24, 3.2),
    "StackExchange": (20, 2.1),
}

SUBSETS: dict[str, Subsets] = {"pile": PILE, "redpajama": REDPAJAMA}
LENGTH_DATA = ("wlb_llm", *SUBSETS)


def sample_lengths(
    name: str, count: int, seed: int, *, long_document_weight: float = 1.0, sigma: float = SIGMA
) -> np.ndarray:
    """Tokens of the first `count` documents of a data set's stream, int64 [count]; see `length_stream`."""
    count = read_whole("count", count, most=MOST_ITEMS)
    stream = length_stream(name, seed, long_document_weight=long_document_weight, sigma=sigma)
    return np.fromiter(islice(stream, count), np.int64, count)


def length_stream(name: str, seed: int, *, long_document_weight: float = 1.0, sigma: float = SIGMA) -> Iterator[int]:
    """Tokens of one document after the other, without end, the same for the same arguments.

    long_document_weight: multiplies the share of documents over 32K tokens; 1 is the data set as published.
    sigma: of the lognormal (`pile`, `redpajama`). Raises ValueError for an unknown name or a value <= 0.
    """
    if not isinstance(name, str) or name not in LENGTH_DATA:
        raise ValueError(f"data set {shown(name)}: expected one of {', '.join(LENGTH_DATA)}")
    seed = read_whole("seed", seed, 0)
    weight = read_number("long_document_weight", long_document_weight, lambda one: 0 < one < np.inf, "a number > 0")
    sigma = read_number("sigma", sigma, lambda one: 0 < one <= MOST_SIGMA, f"a number > 0 and <= {MOST_SIGMA}")
    blocks = _blocks(name, np.random.default_rng(seed), weight, sigma)
    return (length for block in blocks for length in block.tolist())


def windows(
    name: str,
    context: int,
    count: int,
    seed: int,
    *,
    overflow: str = "truncate",
    long_document_weight: float = 1.0,
    sigma: float = SIGMA,
) -> Iterator[np.ndarray]:
    """Document lengths of `count` full windows of `context` tokens, int64 [documents] each.

    overflow: what becomes of a document that does not fit (`flashcp.sharding.packing`).
    """
    count = read_whole("count", count, 0, sys.maxsize)
    lengths = length_stream(name, seed, long_document_weight=long_document_weight, sigma=sigma)
    return (window.document_lengths for window in islice(pack_lengths(lengths, context, overflow), count))


def _blocks(name: str, random: np.random.Generator, weight: float, sigma: float) -> Iterator[np.ndarray]:
    """Blocks of lengths; documents over 32K (or, for weights above 1, all others) are thinned out."""
    while True:
        lengths = _binned(random) if name == "wlb_llm" else _lognormal(SUBSETS[name], random, sigma)
        keep = np.where(lengths > LONG_DOCUMENT, min(1.0, weight), min(1.0, 1.0 / weight))
        yield lengths[random.random(BLOCK) < keep]


def _binned(random: np.random.Generator) -> np.ndarray:
    longest, share = (np.array(column) for column in zip(*WLB_LLM, strict=True))
    drawn = random.choice(len(longest), size=BLOCK, p=share / share.sum())
    return random.integers(np.append(0, longest[:-1])[drawn] + 1, longest[drawn], endpoint=True)


def _lognormal(subsets: Subsets, random: np.random.Generator, sigma: float) -> np.ndarray:
    share, mean_kib = np.array(list(subsets.values()), dtype=np.float64).T
    documents = share / mean_kib
    drawn = random.choice(len(share), size=BLOCK, p=documents / documents.sum())
    log_mean = np.log(mean_kib[drawn] * 1024 / BYTES_PER_TOKEN) - sigma**2 / 2
    return np.maximum(1, np.rint(random.lognormal(log_mean, sigma))).astype(np.int64)
