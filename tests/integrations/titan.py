"""Steps of torchtitan's Trainer on the CPU, over ranks and in one process, on the same packed documents."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import CompileConfig
from torchtitan.distributed import activation_checkpoint
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

from flashcp.integrations.torchtitan import with_flashcp

STEPS, TOKENS, BATCH, VOCABULARY = 4, 128, 4, 2048
WINDOW = 16  # of gpt-oss: documents are longer
CHECKPOINTING = {"full": activation_checkpoint.FullAC.Config, "selective": activation_checkpoint.SelectiveAC.Config}


class Packs(BaseDataLoader):
    """Made-up documents, the same whatever the number of ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        infinite: bool = True
        seed: int = 0

    def __init__(self, config: Config, *, dp_rank: int, local_batch_size: int, seq_len: int, **_: Any) -> None:
        self.rank, self.rows, self.tokens, self.seed = dp_rank, local_batch_size, seq_len, config.seed

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            rows = [self._row(generator) for _ in range(BATCH)][self.rank * self.rows :][: self.rows]
            ids, labels, positions = map(torch.stack, zip(*rows, strict=True))
            yield {"input": ids, "positions": positions}, labels

    def _row(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.randint(3, 60, (40,), generator=generator).tolist()
        ids = torch.randint(3, VOCABULARY, (self.tokens,), generator=generator)
        positions = torch.cat([torch.arange(length) for length in lengths])[: self.tokens]
        last = positions.roll(-1) == 0
        return ids, ids.roll(-1).masked_fill(last, -100), positions

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class NoTokenizer(BaseTokenizer):
    """Documents are tokens already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        raise NotImplementedError

    decode = encode

    def get_vocab_size(self) -> int:
        return VOCABULARY


class DenseAttention(FlexAttention):
    """FlexAttention as a matrix, under the masks that the model makes for it: FlexAttention itself has no backward on
    CPUs, and VarlenAttention no CPU kernel."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        pass

    def forward(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, *, attention_masks: Any,
                scale: float | None = None, enable_gqa: bool = False, out_transform: Any = None) -> Tensor:  # fmt: skip
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        mask = create_mask(attention_masks.mask_mod, len(q), None, q.shape[2], k.shape[2], "cpu")
        scores = (q @ k.mT * (scale or q.shape[-1] ** -0.5)).masked_fill(~mask, float("-inf"))
        out = (scores.softmax(-1) @ v).transpose(1, 2)
        return out if out_transform is None else out_transform(out, scores.logsumexp(-1).transpose(1, 2))


def configuration(name: str, attention: str, layers: int = 2) -> Any:
    """A debug configuration of torchtitan's, on documents of ours. attention: torchtitan's name of it, or `dense`."""
    model = name.partition("_debug")[0]
    config = getattr(import_module(f"torchtitan.models.{model}.config_registry"), name)()
    registry = import_module(f"torchtitan.models.{model}").model_registry
    spec = registry(config.model_spec.flavor, attn_backend="flex" if attention == "dense" else attention)
    spec.model.layers = spec.model.layers[:layers]
    for one in (layer.attention for layer in spec.model.layers):
        if getattr(one, "sliding_window_size", None):
            one.sliding_window_size = WINDOW
            if isinstance(one.inner_attention, VarlenAttention.Config):
                one.inner_attention = VarlenAttention.Config(window_size=(WINDOW - 1, 0))
    if attention == "dense":
        for _, found, layer, field in list(spec.model.traverse(FlexAttention.Config)):
            setattr(layer, field, DenseAttention.Config(block_size=found.block_size))
    for _, experts, _, _ in spec.model.traverse(GroupedExperts.Config):
        experts.hidden_dim = 64
    config.model_spec, config.tokenizer, config.dataloader = spec, NoTokenizer.Config(), Packs.Config()
    config.training = replace(
        config.training, steps=STEPS, seq_len=TOKENS, local_batch_size=BATCH, disable_cuda_graphs=True,
        mixed_precision_param="float32",
    )  # fmt: skip
    config.lr_scheduler.warmup_steps, config.debug.seed, config.metrics.log_freq = 0, 0, 1
    config.checkpoint.enable, config.debug.enable_structured_logging, config.activation_checkpoint = False, False, None
    config.validator = replace(config.validator, enable=True, steps=1, freq=STEPS, dataloader=Packs.Config(seed=1))
    config.comm.trace_buf_size = 0
    return config


class Run(NamedTuple):
    """logs: of each step the loss and the norm of the gradients. gradients: of the first step, by parameter.
    validation: losses. calls: of attention on this rank in that step. graphs: that were compiled."""

    logs: list[tuple[float, float]]
    gradients: dict[str, Tensor]
    validation: list[float]
    calls: int
    graphs: int


def train(folder: str, name: str, attention: str, cp: int = 0, how: dict[str, Any] | None = None) -> Run:
    """torchtitan's Trainer. cp: ranks that share a pack, 0: torchtitan alone. how: checkpointing, full or selective;
    backend, of the compiler, which compiles each block; parallelism, torchtitan's; options, of FlashCPConfig."""
    config, how = configuration(name, attention), how or {}
    if cp:
        config = with_flashcp(config, timeout_s=60, **how.get("options", {}))
        config.parallelism = replace(config.parallelism, context_parallel_degree=cp, **how.get("parallelism", {}))
    config.dump_folder = folder
    groups = dist.get_world_size() // max(1, cp) // config.parallelism.tensor_parallel_degree
    config.training.local_batch_size = BATCH // groups
    if "checkpointing" in how:
        config.activation_checkpoint = CHECKPOINTING[how["checkpointing"]]()
    if "backend" in how:
        config.compile = CompileConfig(enable=True, components=["model"], backend=how["backend"])
    logs: list[tuple[float, float]] = []
    losses: list[float] = []
    with _as_torchrun_would():
        trainer = config.build()
        _initialize(trainer.model_parts[0])
        metrics = trainer.metrics_processor
        metrics.log = lambda step, loss, most, norm, **_: logs.append((loss, norm))
        metrics.log_validation = lambda loss, **_: losses.append(loss)
        gradients: dict[str, Tensor] = {}
        calls: list[int] = []

        def note(*_: Any) -> None:
            calls.append(trainer.sharing.cp._calls if cp else 0)
            if not gradients:
                gradients.update(_gradients(trainer.model_parts[0]))

        trainer.optimizers.register_step_pre_hook(note)
        trainer.train()
        trainer.close()
        graphs = counters["stats"]["unique_graphs"]
    return Run(logs, gradients, losses, calls[0], graphs)


def _grouped_mm(_: Any, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
    """In fp32, as all else; torch's own takes bf16 alone."""
    expert = torch.searchsorted(offs, torch.arange(len(A)), right=True)[:, None]
    return sum(torch.where(expert == number, A, 0).float() @ weight.float() for number, weight in enumerate(B_t))


@contextmanager
def _as_torchrun_would() -> Iterator[None]:
    """The environment of a rank, and what torchtitan changes put back."""
    with (
        patch.dict(os.environ, LOCAL_RANK=str(dist.get_rank())),
        patch("torchtitan.trainer.time", SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda _: None)),
        patch("torchtitan.models.common.decoder.create_attention_mask", create_block_mask),  # compiled, it takes long
        patch.object(GptOssGroupedExperts, "_grouped_mm", _grouped_mm),
        patch.object(torch.Tensor, "bfloat16", torch.Tensor.float),  # in compiled blocks they round still
        torch._dynamo.config.patch(capture_scalar_outputs=torch._dynamo.config.capture_scalar_outputs),
    ):
        torch._dynamo.reset()
        counters.clear()
        try:
            yield
        finally:
            gc.enable()


def _initialize(model: torch.nn.Module) -> None:
    """Weights that do not depend on the number of ranks."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda one: _plain(one[0])):
            whole = torch.randn(parameter.shape, generator=generator)
            whole = 1 + 0.1 * whole if "norm" in name else 0.05 * whole
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.copy_(whole)


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Whole, by parameter."""
    named = {_plain(name): parameter.grad for name, parameter in model.named_parameters()}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x.clone() for name, x in named.items()}


def _plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
