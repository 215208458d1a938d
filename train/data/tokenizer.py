"""Text to tokens: bytes by default, or any tokenizer that the tokenizers package reads."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np

from flashcp.train.data.sources import needed


class Tokenizer(Protocol):
    """Token numbers are below vocab_size. digest: SHA-256 of what it was made from; empty for bytes."""

    vocab_size: int
    digest: str

    def encode(self, text: str) -> np.ndarray:
        """The tokens of one document, its end mark included, int64 [tokens]."""
        ...


class BytesTokenizer:
    """A token a byte of UTF-8; 256 ends the document. Lone surrogates, which UTF-8 has not, become '?'."""

    vocab_size = 257
    digest = ""
    END = 256

    def encode(self, text: str) -> np.ndarray:
        tokens = np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)
        return np.append(tokens.astype(np.int64), self.END)


class FileTokenizer:
    """A tokenizer of the tokenizers package, from a JSON file or by its name on the Hugging Face hub.

    The marks that its own template would add are left out; `end_token`, when given, closes every document.
    """

    def __init__(self, name: str, end_token: str = "") -> None:
        library = needed("tokenizers", f"data.tokenizer={name!r}").Tokenizer
        path = Path(name).expanduser()
        is_file = path.is_file() or name.endswith(".json") or name.startswith((".", "/", "~"))
        try:
            self._library = library.from_file(str(path)) if is_file else library.from_pretrained(name)
        except Exception as error:  # the package raises bare Exceptions, the hub its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            place = "as a tokenizers JSON file" if is_file else "from the Hugging Face hub"
            raise ValueError(
                f"data.tokenizer={name!r}: cannot be read {place} ({reason}); "
                "expected bytes, the path of such a file or a name on the hub"
            ) from error
        self.vocab_size = self._library.get_vocab_size(with_added_tokens=True)
        self.digest = hashlib.sha256(self._library.to_str().encode()).hexdigest()
        end = self._library.token_to_id(end_token) if end_token else None
        if end_token and end is None:
            raise ValueError(f"data.end_token={end_token!r} is not in the vocabulary of {name}")
        self._end = [] if end is None else [end]

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._library.encode(text, add_special_tokens=False).ids + self._end, dtype=np.int64)


def load_tokenizer(name: str, end_token: str = "") -> Tokenizer:
    """`bytes`, a file, or a name on the Hugging Face hub. Raises ValueError for what cannot be read."""
    if name == "bytes":
        if end_token:
            raise ValueError(f"data.end_token={end_token!r}: the bytes tokenizer has its own, leave it empty")
        return BytesTokenizer()
    return FileTokenizer(name, end_token)
