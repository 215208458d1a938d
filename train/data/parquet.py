"""Parquet files: one row a document, one column the text. Needs the optional package pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flashcp.train.data.files import find_files

__all__ = ["ParquetSource"]

BATCH_ROWS = 256


class ParquetSource:
    """Parquet files with a text column. Raises ValueError for files or columns that are not."""

    def __init__(self, path: str, text_field: str) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(
                "data.source='parquet' needs the package pyarrow: pip install 'flashcp[parquet]'"
            ) from error
        self._open = pyarrow.parquet.ParquetFile
        self._files = find_files(path, (".parquet",))
        self._column = text_field
        self.parts = [str(file) for file in self._files]

    def read(self, part: int, skip: int) -> Iterator[str]:
        file = self._files[part]
        try:
            with self._open(file) as table:
                names = table.schema_arrow.names
                if self._column not in names:
                    raise ValueError(f"no column data.text_field={self._column!r}; it has: {', '.join(names)}")
                first_group, skip = _group_of_row(table, skip)
                groups = range(first_group, table.num_row_groups)
                for batch in table.iter_batches(BATCH_ROWS, row_groups=groups, columns=[self._column]):
                    for text in batch.column(0).slice(min(skip, batch.num_rows)).to_pylist():
                        if not isinstance(text, str):
                            raise ValueError(f"column {self._column!r} holds {text!r}: expected text")
                        yield text
                    skip = max(0, skip - batch.num_rows)
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise ValueError(f"{file}: {str(error).splitlines()[0]}") from error


def _group_of_row(table: Any, row: int) -> tuple[int, int]:
    """The row group that holds a row, and the row's number in it: groups before it are not read."""
    group = 0
    while group < table.num_row_groups and row >= table.metadata.row_group(group).num_rows:
        row -= table.metadata.row_group(group).num_rows
        group += 1
    return group, row
