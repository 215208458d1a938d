"""What `flashcp export` writes: the checkpoint's weights under Transformers' names, or one line and nothing."""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashcp.experiments.cli.main import main
from flashcp.train.data.tokenizer import load_tokenizer
from flashcp.train.export import Exported, config_of, export
from tests.train.exported import CONTEXT, MODEL, a_tokenizer, saved
from tests.train.test_damage import Runs, seal
from tests.train.test_run import contents, small, train
from tests.train.test_save_fails import files_of_at_most

pytest.importorskip("safetensors")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, read by its published layout: a length, JSON, bytes."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    tensors = {}
    for name, one in header.items():
        assert one["dtype"] == "F32"
        first, last = (8 + length + offset for offset in one["data_offsets"])
        tensors[name] = torch.from_numpy(np.frombuffer(content[first:last], np.float32).reshape(one["shape"]).copy())
    return tensors


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_are_the_checkpoint_s_under_llama_s_names(tied: bool, tmp_path: Path) -> None:
    model = replace(MODEL, tied_embeddings=tied, layers=1)
    decoder, path = saved(tmp_path / "run", model)
    written = export(path, tmp_path / "out")
    tensors = read_tensors(tmp_path / "out" / "model.safetensors")
    assert written == Exported("LlamaForCausalLM", sum(weight.numel() for weight in tensors.values()), 7, False)
    layer = {
        "input_layernorm": decoder.blocks[0].attention_norm,
        "self_attn.q_proj": decoder.blocks[0].attention.wq,
        "self_attn.k_proj": decoder.blocks[0].attention.wk,
        "self_attn.v_proj": decoder.blocks[0].attention.wv,
        "self_attn.o_proj": decoder.blocks[0].attention.wo,
        "post_attention_layernorm": decoder.blocks[0].feed_forward_norm,
        "mlp.gate_proj": decoder.blocks[0].feed_forward.gate,
        "mlp.up_proj": decoder.blocks[0].feed_forward.up,
        "mlp.down_proj": decoder.blocks[0].feed_forward.down,
    }
    expected = {f"model.layers.0.{name}.weight": module.weight for name, module in layer.items()}
    expected |= {"model.embed_tokens.weight": decoder.embedding.weight, "model.norm.weight": decoder.norm.weight}
    expected |= {} if tied else {"lm_head.weight": decoder.output.weight}
    assert tensors.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(tensors[name], weight), name
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"], config["eos_token_id"]) == (320, tied, 256)


def test_a_tokenizers_file_goes_along(tmp_path: Path) -> None:
    file = a_tokenizer(tmp_path / "words.json")
    _, path = saved(tmp_path / "run", MODEL, tokenizer=str(file), end_token="<end>")
    assert export(path, tmp_path / "out").tokenizer
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == 2
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == names
    there = load_tokenizer(str(tmp_path / "out" / "tokenizer.json"), "<end>")
    assert there.encode("to be").tolist() == load_tokenizer(str(file), "<end>").encode("to be").tolist() == [0, 1, 2]
    moved = file.rename(tmp_path / "moved.json")
    with pytest.raises(ValueError, match=r"data\.tokenizer='.*words\.json': cannot be read"):
        export(path, tmp_path / "again")
    assert export(path, tmp_path / "again", str(moved)).tokenizer
    assert not export(path, tmp_path / "without", "none").tokenizer
    moved.write_text(moved.read_text().replace('"be"', '"bee"'))
    with pytest.raises(ValueError, match=r"^tokenizer='.*moved\.json': not the one that the run had"):
        export(path, tmp_path / "another", str(moved))
    assert not (tmp_path / "another").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 8}, r"^model\.chunk=8: no class of Transformers has it in a decoder like this one$"),
        ({"softcap": 50.0}, r"^model\.softcap=50\.0: no class"),
        ({"sinks": True}, r"^model\.sinks=True: no class"),
        ({"latent": 8, "kv_heads": 4, "window": 8}, r"^model\.latent=8 with model\.window=8: DeepseekV3 has no window"),
    ],
)
def test_what_has_no_counterpart_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(replace(MODEL, **settings), CONTEXT, None)


def test_a_run_is_exported_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train(small(out, checkpoint={"every": 1}, loop={"steps": 2, "accumulation": 1}, model={"layers": 1}))
    assert main(["export", str(out), f"out={tmp_path / 'hf'}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("LlamaForCausalLM of step 2, ")
    weight = contents(out / "checkpoints/step_00000002")["model.output.weight"]
    assert torch.equal(read_tensors(tmp_path / "hf" / "model.safetensors")["lm_head.weight"], weight)
    first = str(out / "checkpoints/step_00000001")
    for words, message in (
        ([first, f"out={tmp_path / 'hf'}"], f"out='{tmp_path / 'hf'}' exists already: expected a folder"),
        ([str(tmp_path), "out=new"], f"{tmp_path}: no checkpoint there; expected a step_* folder, or a run's"),
        ([first], "1 checkpoints and out='': expected CHECKPOINT out=FOLDER"),
        ([first, "out=new", "dtype=bf16"], "dtype: no such override; expected out or tokenizer"),
        ([first, "out=/proc/new"], "out='/proc': cannot be written"),
    ):
        assert main(["export", *words]) == 2
        assert capsys.readouterr().err.startswith(f"flashcp: error: {message}"), words
    assert not Path("new").exists()


def test_a_checkpoint_that_is_not_as_it_was_leaves_nothing(tmp_path: Path) -> None:
    _, path = saved(tmp_path / "run", MODEL)
    metadata, weights = (path / ".metadata").read_bytes(), path / "__0_0.distcp"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            export(path, tmp_path / "out")
        assert [one.name for one in tmp_path.iterdir()] == ["run"]

    identity = json.loads((path / "identity.json").read_text())
    (path / ".metadata").write_bytes(metadata[:-1] + b"!")
    refused(r"step_00000007: \.metadata: other content \(another SHA-256\)$")
    (path / ".metadata").write_bytes(pickle.dumps(Runs(f"touch {tmp_path}/ran")))
    seal(path)
    refused(r"step_00000007: cannot be read: ValueError: it names posix\.system")
    (path / ".metadata").write_bytes(metadata)
    identity["model"]["layers"] = 5
    (path / "identity.json").write_text(json.dumps(identity))
    seal(path)
    refused(r"step_00000007: cannot be read: .*blocks\.4\.")
    identity["model"].update(layers=4, vocab_size=321)
    (path / "identity.json").write_text(json.dumps(identity))
    seal(path)
    refused(r"step_00000007: cannot be read: .*[Ss]ize")
    weights.write_bytes(b"")
    refused(r"step_00000007: __0_0\.distcp: 0 bytes, expected \d+$")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    _, path = saved(tmp_path / "run", MODEL)
    with files_of_at_most(100_000), pytest.raises(ValueError, match=r"^out='.*out': cannot be written \(.*too large"):
        export(path, tmp_path / "out")
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
