"""Text to tokens: bytes by default, or any tokenizer that the tokenizers package reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from flashcp.files import read_bounded, read_path
from flashcp.sharding.values import first_line, shown
from flashcp.train.data.sources import needed

TOKENIZER_MIB = 256


class Tokenizer(Protocol):
    """Token numbers are below vocab_size. digest: SHA-256 of what it was made from; empty for bytes. notes: what of its
    file does not count, a line each, to be told once. end_id: the token that ends a document; None: none does."""

    vocab_size: int
    end_id: int | None
    digest: str
    notes: Sequence[str]

    def encode(self, text: str) -> np.ndarray:
        """The tokens of one document, its end mark included, int64 [tokens]."""
        ...


class BytesTokenizer:
    """A token a byte of UTF-8; 256 ends the document. Lone surrogates, which UTF-8 has not, become '?'."""

    vocab_size = 257
    digest = ""
    notes: Sequence[str] = ()
    END = 256
    end_id: int | None = END

    def encode(self, text: str) -> np.ndarray:
        content = text.encode("utf-8", errors="replace")
        tokens = np.empty(len(content) + 1, dtype=np.int64)
        tokens[:-1], tokens[-1] = np.frombuffer(content, dtype=np.uint8), self.END
        return tokens


class FileTokenizer:
    """A tokenizer of the tokenizers package, from a JSON file or by its name on the Hugging Face hub.

    The marks that its own template would add are left out; `end_token`, when given, closes every document.
    stored_lengths: pad and truncate as the file says; else its padding and truncation are switched off, which would
    train on pad tokens and lose ends of documents. parse_special: a special token that a document spells becomes the
    mark; else it is text.
    """

    def __init__(
        self, name: str, end_token: str = "", stored_lengths: bool = False, parse_special: bool = False
    ) -> None:
        library = needed("tokenizers", f"data.tokenizer={shown(name)}").Tokenizer
        path = read_path(name, "data.tokenizer")
        is_file = path.is_file() or name.endswith(".json") or name.startswith((".", "/", "~"))
        try:
            self._library = (
                library.from_buffer(read_bounded(path, str(path), TOKENIZER_MIB))
                if is_file
                else library.from_pretrained(name)
            )
        except Exception as error:  # the package raises bare Exceptions, the hub its own
            place = "as a tokenizers JSON file" if is_file else "from the Hugging Face hub"
            raise ValueError(
                f"data.tokenizer={shown(name)}: cannot be read {place} ({first_line(error)}); "
                "expected bytes, the path of such a file or a name on the hub"
            ) from error
        self.vocab_size = self._library.get_vocab_size(with_added_tokens=True)
        self._library.encode_special_tokens = not parse_special
        switched = ("" if stored_lengths else self._without_lengths(), "" if parse_special else self._marks())
        self.notes: Sequence[str] = [f"data.tokenizer={shown(name)}: {what}" for what in switched if what]
        self.digest = hashlib.sha256(self.to_json().encode()).hexdigest()
        end = self._library.token_to_id(end_token) if end_token else None
        if end_token and end is None:
            raise ValueError(f"data.end_token={shown(end_token)} is not in the vocabulary of {name}")
        self.end_id, self._end = end, [] if end is None else [end]

    def _without_lengths(self) -> str:
        settings = {"padding": self._library.padding, "truncation": self._library.truncation}
        self._library.no_padding()
        self._library.no_truncation()
        stored = " and ".join(kind for kind, value in settings.items() if value)
        return f"its stored {stored} is switched off (data.stored_lengths)" if stored else ""

    def _marks(self) -> str:
        marks = [token.content for token in self._library.get_added_tokens_decoder().values() if token.special]
        said = f"a special token in a document, such as {shown(''.join(marks[:1]))}, is text (data.parse_special)"
        return said if marks else ""

    def to_json(self) -> str:
        """The tokenizer as its file would have it."""
        return str(self._library.to_str())

    def encode(self, text: str) -> np.ndarray:
        """Raises ValueError for text that the tokenizer has no tokens for."""
        try:
            found = self._library.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the package raises bare Exceptions
            raise ValueError(f"the tokenizer has no tokens for {shown(text)}: {first_line(error)}") from error
        return np.array(found + self._end, dtype=np.int64)


def load_tokenizer(
    name: str, end_token: str = "", stored_lengths: bool = False, parse_special: bool = False
) -> Tokenizer:
    """`bytes`, a file, or a name on the Hugging Face hub. Raises ValueError for what cannot be read."""
    if name == "bytes":
        if end_token:
            raise ValueError(f"data.end_token={shown(end_token)}: the bytes tokenizer has its own, leave it empty")
        return BytesTokenizer()
    return FileTokenizer(name, end_token, stored_lengths, parse_special)
