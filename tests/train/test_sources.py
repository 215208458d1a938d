"""Documents from files: every format, resumption at any record, and errors that name file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from flashcp.train.data.sources import SOURCES, DataConfig, Source, open_source
from flashcp.train.data.tokenizer import load_tokenizer

TEXTS = ["first", "zweites: äöü", "third\nwith a line break", "4"]


def read_all(source: Source) -> list[str]:
    return [text for part in range(len(source.parts)) for text in source.read(part, 0)]


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def write_text(folder: Path) -> DataConfig:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / ".hidden").write_text("no document")
    return DataConfig(source="text", path=str(folder))


def write_jsonl(folder: Path, suffix: str = "") -> DataConfig:
    (folder / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](lines_of(TEXTS[:3])))
    (folder / f"b.jsonl{suffix}").write_bytes(COMPRESS[suffix](b"\n" + lines_of(TEXTS[3:]) + b"\n"))
    return DataConfig(source="jsonl", path=str(folder))


def write_parquet(folder: Path) -> DataConfig:
    for name, texts in (("a", TEXTS[:3]), ("b", TEXTS[3:])):
        table = pyarrow.table({"id": list(range(len(texts))), "body": texts})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=2)
    return DataConfig(source="parquet", path=str(folder), text_field="body")


WRITERS: dict[str, Callable[[Path], DataConfig]] = {
    "text": write_text,
    "parquet": write_parquet,
    **{f"jsonl{suffix}": lambda folder, suffix=suffix: write_jsonl(folder, suffix) for suffix in COMPRESS},
}


@pytest.mark.parametrize("kind", WRITERS)
def test_texts_come_back_in_order_and_from_any_record(kind: str, tmp_path: Path) -> None:
    source = open_source(WRITERS[kind](tmp_path))
    assert read_all(source) == TEXTS
    for part in range(len(source.parts)):
        texts = list(source.read(part, 0))
        for skip in range(len(texts) + 1):
            assert list(source.read(part, skip)) == texts[skip:]


def test_a_glob_chooses_files(tmp_path: Path) -> None:
    write_text(tmp_path)
    source = open_source(DataConfig(source="text", path=str(tmp_path / "[12].txt")))
    assert read_all(source) == TEXTS[1:3]


def test_the_standard_library_is_sorted_text_without_its_tests() -> None:
    source = open_source(DataConfig())
    assert len(source.parts) > 200
    assert list(source.parts) == sorted(source.parts)
    assert not [part for part in source.parts if "/test/" in part or "site-packages" in part]
    (dataclasses,) = [number for number, part in enumerate(source.parts) if part.endswith("/dataclasses.py")]
    (text,) = source.read(dataclasses, 0)
    assert "def dataclass(" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"not a line of JSON"),
        (b'{"text": "\xff"}', r"not a line of JSON .*utf-8"),
        (b"[" * 100_000, r"not a line of JSON"),
        (b'{"body": "x"}', r"no text in data\.text_field='text'; it has: body"),
        (b'{"text": 3}', r"data\.text_field='text' holds 3: expected text"),
        (b"[1]", r"no text in data\.text_field='text'; it has: a list"),
    ],
)
def test_a_corrupt_line_is_named_by_file_and_line(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(lines_of(TEXTS[:2]) + b"\n" + line + b"\n" + lines_of(TEXTS[2:]))
    texts = open_source(DataConfig(source="jsonl", path=str(path))).read(0, 0)
    assert [next(texts), next(texts)] == TEXTS[:2]
    with pytest.raises(ValueError, match=rf"c\.jsonl:4: {message}"):
        next(texts)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_a_damaged_compressed_file_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(b"this was never compressed" + bytes(100))
    with pytest.raises(ValueError, match=rf"d\.jsonl\{suffix}:1: cannot be read"):
        read_all(open_source(DataConfig(source="jsonl", path=str(path))))


def test_a_binary_file_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"abc\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.bin: not UTF-8 text \(byte 3\)"):
        read_all(open_source(DataConfig(source="text", path=str(tmp_path))))


def test_parquet_row_groups_longer_than_one_read(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(700)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=600)
    source = open_source(DataConfig(source="parquet", path=str(tmp_path)))
    for skip in (0, 255, 256, 300, 599, 600, 650, 700):
        assert list(source.read(0, skip)) == texts[skip:]


def test_parquet_errors_name_the_file(tmp_path: Path) -> None:
    data = write_parquet(tmp_path)
    data.text_field = "text"
    with pytest.raises(ValueError, match=r"a\.parquet: no column data\.text_field='text'; it has: id, body"):
        read_all(open_source(data))
    data.text_field = "id"
    with pytest.raises(ValueError, match=r"a\.parquet: column 'id' holds 0: expected text"):
        read_all(open_source(data))
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=r"a\.parquet: "):
        read_all(open_source(data))


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_nothing_to_read_is_an_error(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path='.*nowhere': no such file or directory"):
        open_source(DataConfig(source=kind, path=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"data\.path='.*': no file.* in this directory"):
        open_source(DataConfig(source=kind, path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        open_source(DataConfig(source=kind))


def test_unknown_source_lists_the_legal_ones() -> None:
    with pytest.raises(ValueError, match=r"data\.source='csv': expected one of stdlib, text, jsonl"):
        open_source(DataConfig(source="csv"))


@pytest.mark.parametrize("name", ["wlb_llm", "pile", "redpajama", "lengths"])
def test_lengths_without_text_cannot_be_trained_on(name: str) -> None:
    assert name not in SOURCES
    with pytest.raises(ValueError, match=rf"data\.source='{name}' holds document lengths and no text"):
        open_source(DataConfig(source=name))


def test_a_hugging_face_data_set(tmp_path: Path) -> None:
    """Only where the package is installed; a directory is to it what a name on the hub is."""
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_bytes(lines_of(TEXTS))
    source = open_source(DataConfig(source="huggingface", path=str(tmp_path)))
    assert [list(source.read(0, skip)) for skip in (0, 3)] == [TEXTS, TEXTS[3:]]
    with pytest.raises(ValueError, match=r"cannot load it from the Hugging Face hub: .*test"):
        open_source(DataConfig(source="huggingface", path=str(tmp_path), split="test"))
    with pytest.raises(ValueError, match=r"no text in data\.text_field='body'; it has: id, text"):
        read_all(open_source(DataConfig(source="huggingface", path=str(tmp_path), text_field="body")))


@pytest.mark.parametrize(("source", "package"), [("huggingface", "datasets"), ("parquet", "pyarrow.parquet")])
def test_a_missing_package_is_one_clear_line(source: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package.split('.')[0]}: pip install"):
        open_source(DataConfig(source=source, path="somewhere"))


def test_text_is_what_the_file_holds(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbfone\r\ntwo\rthree\n\x00\x0c\xc2\x85end"
    (tmp_path / "a.txt").write_bytes(content)
    (text,) = read_all(open_source(DataConfig(source="text", path=str(tmp_path))))
    assert bytes(load_tokenizer("bytes").encode(text)[:-1].tolist()) == content


BAD_LINES = [b'{"text": null}', b"not json", b'{"body": "x"}', b'{"text": "\xff"}', b"[" * 100_000, b'"' + b"x" * 2**20]


def test_bad_records_are_passed_over_and_told(tmp_path: Path) -> None:
    lines = [line for bad, good in zip(BAD_LINES, TEXTS * 2, strict=False) for line in (bad, lines_of([good]).strip())]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, BAD_LINES[0]]))
    source = open_source(DataConfig(source="jsonl", path=str(tmp_path), record_mib=1))
    told: list[ValueError] = []
    assert list(source.read(0, 0, told.append)) == (TEXTS * 2)[: len(BAD_LINES)]
    numbers = [int(str(error).split("a.jsonl:")[1].split(":")[0]) for error in told]
    assert numbers == [1, 3, 5, 7, 9, 11, 13]
    assert str(told[5]).endswith("a.jsonl:11: a line of more than data.record_mib=1 MiB")
    for skip in range(2 * len(BAD_LINES) + 2):  # bad records count as records
        assert list(source.read(0, skip, told.append)) == (TEXTS * 2)[skip // 2 : len(BAD_LINES)]
    with pytest.raises(ValueError, match=r"a\.jsonl:11: a line of more than data\.record_mib=1 MiB"):
        list(source.read(0, 10))


def test_bad_rows_and_files_are_passed_over(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b", "x" * (2**20 + 1)]}), tmp_path / "a.parquet")
    told: list[ValueError] = []
    rows = open_source(DataConfig(source="parquet", path=str(tmp_path / "a.parquet"), record_mib=1))
    assert list(rows.read(0, 0, told.append)) == ["a", "b"]
    for name, content in (("a.txt", b"\xff"), ("b.txt", b"fine"), ("c.txt", b"x" * (2**20 + 1))):
        (tmp_path / name).write_bytes(content)
    files = open_source(DataConfig(source="text", path=str(tmp_path / "*.txt"), record_mib=1))
    assert [text for part in range(3) for text in files.read(part, 0, told.append)] == ["fine"]
    assert [str(error).rpartition("/")[2][:25] for error in told] == [
        "column 'text' holds None:",
        "a row of more than data.r",
        "a.txt: not UTF-8 text (by",
        "c.txt: more than data.rec",
    ]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_line_without_end_takes_bounded_memory(suffix: str, tmp_path: Path) -> None:
    bomb = tmp_path / f"bomb.jsonl{suffix}"
    if suffix:
        bomb.write_bytes(COMPRESS[suffix](bytes(300 * 2**20)))
        assert bomb.stat().st_size < 2**20
    else:
        bomb.touch()
        os.truncate(bomb, 300 * 2**20)
    texts = open_source(DataConfig(source="jsonl", path=str(bomb), record_mib=4)).read(0, 0)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"bomb\.jsonl\{suffix}:1: a line of more than data\.record_mib=4 MiB"):
        next(texts)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 40 * 2**20


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_a_pipe_and_a_device_are_no_files(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path, what in ((tmp_path / "pipe.txt", "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(ValueError, match=rf"^data\.path='{path}': {what}, expected a file$"):
            open_source(DataConfig(source=kind, path=str(path)))
