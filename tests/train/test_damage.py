"""A checkpoint loads as it was written or not at all, and nothing in a stranger's checkpoint runs."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.ranks import RankError, run_ranks
from tests.train.test_run import small, train

LAST = "checkpoints/step_00000002"
FILES = (".metadata", "__0_0.distcp", "identity.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(small(out, checkpoint={"every": 1}, loop={"steps": 2}))
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def go_on(out: Path) -> None:
    train(small(out, checkpoint={"resume": str(out / LAST)}, loop={"steps": 3}))


def seal(folder: Path) -> None:
    """Make the checksums of a changed checkpoint right again, as whoever changes it on purpose does."""

    def digest(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    identity = json.loads((folder / "identity.json").read_text())
    identity.pop("checksum", None)
    contents = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "identity.json"}
    identity["files"] = {name: [len(content), digest(content)] for name, content in contents.items()}
    identity["checksum"] = digest(json.dumps(identity, sort_keys=True).encode())
    (folder / "identity.json").write_text(json.dumps(identity))


def test_every_file_is_guarded(finished: Path) -> None:
    assert tuple(sorted(file.name for file in (finished / LAST).iterdir())) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_byte_anywhere_is_refused_by_name(name: str, seed: int, copied: Path) -> None:
    file = copied / LAST / name
    content = bytearray(file.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 1 << seed
    file.write_bytes(content)
    before = (copied / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"^checkpoint .*step_00000002: {name}"):
        go_on(copied)
    assert (copied / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_step_is_refused_by_name(name: str, copied: Path) -> None:
    shutil.copy(copied / "checkpoints/step_00000001" / name, copied / LAST / name)
    named = r"\.metadata|__0_0\.distcp" if name == "identity.json" else name
    with pytest.raises(ValueError, match=rf"^checkpoint .*step_00000002: ({named}): other content \(another SHA"):
        go_on(copied)


def test_all_ranks_hear_of_damage_that_one_of_them_read(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_ranks(train, 2, small(out, checkpoint={"every": 2}, loop={"steps": 2}))
    names = sorted(json.loads((out / LAST / "identity.json").read_text())["files"])
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    (out / LAST / "__1_0.distcp").write_bytes(b"")
    with pytest.raises(RankError) as refused:
        run_ranks(train, 2, small(out, checkpoint={"resume": "latest"}, loop={"steps": 3}))
    assert str(refused.value).count(r"step_00000002: __1_0.distcp: 0 bytes, expected") == 2


class Runs:
    """A pickle that runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_command_in_the_metadata_is_refused_and_not_run(sealed: bool, copied: Path, tmp_path: Path) -> None:
    (copied / LAST / ".metadata").write_bytes(pickle.dumps(Runs(f"touch {tmp_path}/ran")))
    if sealed:
        seal(copied / LAST)
    with pytest.raises(
        ValueError, match=r"names posix\.system, which no checkpoint of ours" if sealed else r"\.metadata:"
    ):
        go_on(copied)
    assert not (tmp_path / "ran").exists()


def test_a_command_among_the_values_is_refused_and_not_run(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate is no tensor: torch would unpickle whatever stands in its place."""
    from flashcp.train import checkpoint

    real = checkpoint.state_of

    def with_a_command(*given: Any) -> dict[str, Any]:
        state = real(*given)
        state["optimizer"]["param_groups"][0]["eps"] = Runs(f"touch {tmp_path}/ran")
        return state

    monkeypatch.setattr(checkpoint, "state_of", with_a_command)
    train(small(tmp_path / "evil", checkpoint={"every": 2}, loop={"steps": 2}))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"step_00000002: cannot be read: UnpicklingError: Weights only load failed"):
        go_on(tmp_path / "evil")
    assert not (tmp_path / "ran").exists()


def test_the_metadata_of_torch_itself_is_read(finished: Path) -> None:
    from flashcp.train.unpickle import DataReader

    assert DataReader(finished / LAST).read_metadata().state_dict_metadata == (
        dcp.FileSystemReader(finished / LAST).read_metadata().state_dict_metadata
    )


def test_every_dtype_can_stand_in_the_metadata(tmp_path: Path) -> None:
    from flashcp.train.unpickle import DataReader

    state = {str(dtype): torch.zeros(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float64, torch.bool)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=tmp_path / "all")
    assert len(DataReader(tmp_path / "all").read_metadata().state_dict_metadata) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(getattr), r"names builtins\.getattr"),
        (b"\x80\x04\x8c\x05torch\x8c\x0bhub.os.systemq\x00\x93.", "cannot be read"),
        (pickle.dumps({"a": 1}), r"\.metadata holds a dict, expected Metadata"),
        (b"\x80\x04", "EOFError|UnpicklingError"),
    ],
)
def test_metadata_that_is_something_else(content: bytes, message: str, copied: Path) -> None:
    (copied / LAST / ".metadata").write_bytes(content)
    seal(copied / LAST)
    with pytest.raises(ValueError, match=message):
        go_on(copied)


def test_a_device_in_place_of_a_file_is_not_read(copied: Path) -> None:
    (copied / LAST / "__0_0.distcp").unlink()
    (copied / LAST / "__0_0.distcp").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"step_00000002: __0_0\.distcp: a device, expected a file$"):
        go_on(copied)
