"""A data set from the Hugging Face hub, streamed. Needs the optional package datasets, and the network."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["HuggingFaceSource"]


class HuggingFaceSource:
    """One split of a data set by name. Raises ValueError when it cannot be loaded or has no such column."""

    def __init__(self, name: str, subset: str, split: str, text_field: str) -> None:
        if not name:
            raise ValueError("data.path is empty: expected the name of a data set on the Hugging Face hub")
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError("data.source='huggingface' needs the package datasets: pip install datasets") from error
        try:
            self._rows = load_dataset(name, subset or None, split=split, streaming=True)
        except Exception as error:  # whatever the hub, the network or the data set's own files raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"data.path={name!r}: cannot load it from the Hugging Face hub: {reason}") from error
        self._text_field = text_field
        self.parts = [f"{name}/{subset}/{split}" if subset else f"{name}/{split}"]

    def read(self, part: int, skip: int) -> Iterator[str]:
        for row in self._rows.skip(skip):
            if not isinstance(row.get(self._text_field), str):
                raise ValueError(
                    f"{self.parts[part]}: no text in data.text_field={self._text_field!r}; it has: {', '.join(row)}"
                )
            yield row[self._text_field]
