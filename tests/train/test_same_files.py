"""A rank that is about to read other files than the others is known at the start, by file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import RankError, run_ranks
from tests.train.test_files_read import with_own_text
from tests.train.test_run import small

FILES = {"a.txt": "a" * 1200, "deep/b.txt": "b" * 900, "deep/c.txt": "c" * 700}


def folders(root: Path, of_rank_1: dict[str, str]) -> None:
    for rank in range(3):
        for name, text in (FILES if rank != 1 else of_rank_1).items():
            file = root / str(rank) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"deep/b.txt": ""}, "deep/b.txt: no such file on rank 1; 900 bytes on ranks 0, 2"),
        ({"deep/bb.txt": "b"}, "deep/bb.txt: 1 bytes on rank 1; no such file on ranks 0, 2"),
        ({"deep/c.txt": "c" * 701}, "deep/c.txt: 701 bytes on rank 1; 700 bytes on ranks 0, 2"),
    ],
)
def test_another_file_on_one_rank_is_named_on_all_before_anything_is_written(
    changed: dict[str, str], said: str, tmp_path: Path
) -> None:
    folders(tmp_path, {name: text for name, text in (FILES | changed).items() if text})
    with pytest.raises(RankError) as refused:
        run_ranks(with_own_text, 3, small(tmp_path / "run", data={"source": "text"}), str(tmp_path))
    why = f"ValueError: {said}; expected the same files in data.path on every node"
    assert str(refused.value).count(why) == 3
    assert not (tmp_path / "run").exists()


def test_the_same_files_at_another_place_are_the_same(tmp_path: Path) -> None:
    folders(tmp_path, FILES)
    run_ranks(with_own_text, 3, small(tmp_path / "run", data={"source": "text"}, loop={"steps": 1}), str(tmp_path))
