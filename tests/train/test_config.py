"""The run's configuration: from JSON, plain mappings and OmegaConf, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from flashcp.train.config import TrainConfig


def test_from_file_and_back(tmp_path: Path) -> None:
    values = {"context": 128, "model": {"layers": 3}, "sharding": {"name": "flashcp"}}
    (tmp_path / "c.json").write_text(json.dumps(values))
    config = TrainConfig.from_file(tmp_path / "c.json")
    assert (config.context, config.model.layers, config.model.dim) == (128, 3, TrainConfig().model.dim)
    config.check(world_size=2)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config .*nowhere\.json: cannot be read \(No such file"):
        TrainConfig.from_file(tmp_path / "nowhere.json")
    (tmp_path / "c.json").write_text("{context: 1}")
    with pytest.raises(ValueError, match=r"config .*c\.json: not JSON"):
        TrainConfig.from_file(tmp_path / "c.json")


def test_omegaconf_composes_it() -> None:
    schema = OmegaConf.structured(TrainConfig)
    config = OmegaConf.merge(schema, OmegaConf.from_dotlist(["model.layers=2", "tracker.tags=[a,b]"]))
    read = TrainConfig.from_dict(config)  # type: ignore[arg-type]  # a container is a mapping
    assert (read.model.layers, read.tracker.tags) == (2, ["a", "b"])
    assert TrainConfig.from_dict(OmegaConf.to_container(schema)) == TrainConfig()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "world_size", "message"),
    [
        ({"modle": {}}, 1, r"modle: no such field; expected one of out, context, batch_windows, data_parallel, seed"),
        ({"data_parallel": 2, "batch_windows": 2}, 3, r"data_parallel=2: expected a divisor of world_size=3"),
        ({"data_parallel": 2}, 4, r"batch_windows=1: expected a multiple of data_parallel=2"),
        (
            {"batch_windows": 2**20},
            1,
            r"batch_windows=1048576: one plan for 4294967296 tokens, expected at most 2147483647",
        ),
        ({"batch_windows": 0}, 1, r"batch_windows=0: expected a whole number >= 1"),
        ({"out": ""}, 1, r"out is empty"),
        ({"data": {"overflow": "split"}}, 1, r"data\.overflow='split': expected one of truncate, carry"),
        ({"data": {"epochs": -1}}, 1, r"data\.epochs=-1: expected a whole number >= 0"),
        ({"data": {"prefetch": 0}}, 1, r"data\.prefetch=0: expected a whole number >= 1"),
        ({"sharding": {"name": "zigzag"}}, 1, r"sharding\.name='zigzag': expected one of contiguous"),
        ({"exchange": {"name": "smoke"}}, 1, r"exchange\.name='smoke': expected one of exact"),
        (
            {"sharding": {"name": "flashcp", "x": 1}},
            1,
            r"sharding\.x: no such field; expected one of tolerance",
        ),
        ({"sharding": {"name": "flashcp", "budget": "many"}}, 1, r"sharding\.budget='many': expected a whole number"),
        ({"sharding": {"name": "flashcp", "tolerance": 0}}, 1, r"sharding\.tolerance=0\.0: expected"),
        (
            {"exchange": {"name": "ulysses"}, "model": {"heads": 8, "kv_heads": 4}},
            3,
            r"exchange='ulysses' with model\.heads=8, kv_heads=4: cannot be shared out among 3 ranks; expected",
        ),
        (
            {"parallel": {"head_ranks": 3}},
            4,
            r"parallel\.head_ranks=3: expected a number that divides world_size=4",
        ),
        (
            {"parallel": {"head_ranks": 3}},
            3,
            r"parallel\.head_ranks=3 with model\.heads=8, kv_heads=4: cannot be shared out among 3 ranks",
        ),
        ({"parallel": {"head_ranks": 0}}, 1, r"parallel\.head_ranks=0: expected auto or a whole number >= 1"),
        ({"parallel": {"head_ranks": "2"}}, 2, r"parallel\.head_ranks='2': expected auto or a whole number >= 1"),
        ({"parallel": {"head_ranks": True}}, 2, r"parallel\.head_ranks=True: expected auto or a whole number >= 1"),
        (
            {"parallel": {"head_ranks": "auto"}},
            2,
            r"parallel\.cluster='' with parallel\.head_ranks=auto: expected one of a100-nvlink, ",
        ),
        (
            {"parallel": {"head_ranks": "auto", "cluster": "h1000"}},
            2,
            r"parallel\.cluster='h1000': expected one of a100-nvlink, ",
        ),
        ({"parallel": {"cluster": "h1000"}}, 2, r"parallel\.cluster='h1000': expected"),
        (
            {"parallel": {"head_ranks": "auto", "cluster": "h100-nvlink"}, "exchange": {"name": "ulysses"}},
            3,
            r"exchange='ulysses' with model\.heads=8, kv_heads=4: cannot be shared out among 3 ranks; expected",
        ),
        ({"parallel": {"tuning": {"forward": "fast"}}}, 1, r"parallel\.tuning\.forward: 'fast': expected QUERY_ROWSx"),
        ({"parallel": {"tuning": {"sideways": ""}}}, 1, r"parallel\.tuning\.sideways: no such field; expected one of"),
        ({"loop": {"steps": 0}}, 1, r"loop\.steps=0: expected a whole number >= 1"),
        ({"loop": {"precision": "fp8"}}, 1, r"loop\.precision='fp8': expected one of fp32, bf16"),
        ({"loop": {"device": "tpu"}}, 1, r"loop\.device='tpu': expected one of auto, cpu, cuda"),
        ({"loop": {"timeout_s": 0}}, 1, r"loop\.timeout_s=0\.0: expected seconds > 0"),
        ({"loop": {"timeout_s": float("inf")}}, 1, r"loop\.timeout_s=inf: expected seconds > 0"),
        ({"parallel": {"timeout_s": float("nan")}}, 1, r"parallel\.timeout_s=nan: expected seconds > 0"),
        ({"optimizer": {"lr": float("inf")}}, 1, r"optimizer\.lr=inf: expected a finite number"),
        ({"optimizer": {"weight_decay": float("inf")}}, 1, r"optimizer\.weight_decay=inf: expected a finite number"),
        ({"model": {"rope_theta": 0}}, 1, r"model\.rope_theta=0\.0: expected a finite number > 0"),
        ({"model": {"norm_eps": 0}}, 1, r"model\.norm_eps=0\.0: expected a finite number > 0"),
        ({"context": 1}, 1, r"context=1: expected a whole number from 2 to 2147483647"),
        ({"context": 2**31}, 1, r"context=2147483648: expected a whole number from 2 to 2147483647"),
        ({"seed": -1}, 1, r"seed=-1: expected a whole number >= 0"),
        ({"tracker": {"wandb": "on"}}, 1, r"tracker\.wandb='on': expected one of offline, online, disabled"),
        ({"checkpoint": {"every": -1}}, 1, r"checkpoint\.every=-1: expected a whole number >= 0"),
        ({"checkpoint": {"keep": 0}}, 1, r"checkpoint\.keep=0: expected a whole number >= 1"),
    ],
)
def test_what_cannot_run_is_named(values: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(values).check(world_size)
