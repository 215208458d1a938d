"""A checkpoint is read as data: nothing in it runs, whoever wrote it.

torch.distributed.checkpoint unpickles `.metadata` and everything that is no tensor. Here the metadata may name
the few classes it is made of, and the rest is read as torch reads weights.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from flashcp.files import read_bounded

METADATA = ".metadata"
METADATA_MIB = 256
_DCP = "torch.distributed.checkpoint"
_CLASSES = {
    f"{_DCP}.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    f"{_DCP}.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),  # Python 3.13
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(f"it names {module}.{name}, which no checkpoint of ours does; nothing of it was run")


class DataReader(FileSystemReader):
    """Reads a checkpoint's files, the metadata without running anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = read_bounded(Path(self.path) / METADATA, METADATA, METADATA_MIB)
        metadata = _Unpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{METADATA} holds a {type(metadata).__name__}, expected Metadata")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class DataPlanner(DefaultLoadPlanner):
    """Reads what is no tensor (learning rates, counts) as torch reads weights."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain, again = torch.load(value, weights_only=True), io.BytesIO()
        torch.save(plain, again)  # what torch reads next, without weights_only, we wrote
        again.seek(0)
        super().load_bytes(read_item, again)
