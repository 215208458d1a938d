"""Good bytes, spoiled: cut, doubled, overwritten, with what parsers trip over put in."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

TOKENS = [
    *(b"", b"\0", b"\xff", b"\n", b"\r", b" ", b",", b":", b'"', b"'", b"[", b"]", b"{", b"}", b"\\", b"\xef\xbb\xbf"),
    *(b"null", b"true", b"-1", b"0", b"1", b"1.5", b"1e999", b"NaN", b"Infinity", b"0x1F", b"9" * 20, b"9" * 5000),
    *(b"9223372036854775808", b"-9223372036854775809", b"18446744073709551616", b"2147483648", b'"x"', b"[]", b"{}"),
    *(b"&a [*a]", b"*a", b"!!python/object:os.system {}", b"<<: *a", b"? ", b"- ", b"---\n", b"${x}", b"\xc2\x85"),
    *(b"[" * 3000, b"{" * 200, b"a" * 5000, b'{"a":' * 3000, b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80"),
]  # fmt: skip


@st.composite
def spoiled(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds after up to six changes, or bytes that nobody wrote."""
    if not draw(st.integers(0, 15)):
        return draw(st.binary(max_size=200))
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(content)))
        stop = start + draw(st.sampled_from([0, 0, 1, 2, 5, 20, 1000]))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            put = draw(st.sampled_from(TOKENS))
        elif kind == 1:
            put = draw(st.binary(min_size=1, max_size=4))
        elif kind == 2:
            put = content[start:stop] * draw(st.integers(0, 3))
        else:
            put = draw(st.sampled_from(seeds))[start:stop]
        content = content[:start] + put + content[stop:]
    return content
