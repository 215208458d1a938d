"""What the adapters of GPU kernels hand over, and what they make of the answer, without a GPU.

Behind torch's own schemas, and behind the signatures that the other packages publish, stands the CPU's kernel, with the
layouts that each kernel documents. So names, order, defaults and layouts are checked; the kernels themselves are not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import Library

from flashcp.kernels.varlen import KERNELS, cudnn
from flashcp.kernels.varlen.base import Sequences, VarlenKernel, deterministic
from flashcp.kernels.varlen.flash_attention_3 import FlashAttention3
from flashcp.kernels.varlen.flash_attention_4 import FlashAttention4
from flashcp.kernels.varlen.sdpa import Sdpa
from tests.packs import random_qkv

SCALE = 0.3
LENGTHS = ("cum_seq_q", "cum_seq_k", "max_q", "max_k")  # as torch calls them
# hopper/flash_api.cpp of Dao-AILab/flash-attention at 0251105a and of fa3-fwd 0.0.3: what both register.
FA3_FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None, Tensor? q_v = None, "
    "Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
    "Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, "
    "int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None, "
    "Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None, "
    "Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False, "
    "int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0, "
    "bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0, "
    "bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
FA3_BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq = None, "
    "Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
    "Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None, "
    "float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, int window_size_right = -1, "
    "float softcap = 0.0, bool deterministic = False, int sm_margin = 0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def cases(kernel: VarlenKernel) -> list[tuple[tuple[Tensor, ...], Sequences, float]]:
    """q, k, v, gradient, sequences and softcap, causal and not; k and v as the halves of a receive buffer. Windows and
    softcap where the kernel says that it has them."""
    q, k, v, grad = random_qkv(12, 4, 2, 16, torch.bfloat16, seed=0)
    buffer = torch.stack((k, v), dim=1)
    own, prefix = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 12], [0, 3, 9]))
    half = torch.tensor([0, 2, 12], dtype=torch.int32)
    whole, part = (q, buffer[:, 0], buffer[:, 1], grad), (q, buffer[:9, 0], buffer[:9, 1], grad)
    left = (-1, 0, 2) if kernel.has_windows() else (-1,)
    softcaps = (0.0, 1.5) if kernel.has_softcap() else (0.0,)
    found = [(whole, Sequences(own, own, 7, 7, True, x), softcap) for x in left for softcap in softcaps]
    return found + [(part, Sequences(half, prefix, 10, 6, False, x), softcap) for x in left for softcap in softcaps]


def check_like_the_cpu(kernel: VarlenKernel, backward: bool = True) -> None:
    """Results and gradients of the kernel are those of the CPU's, which stands behind what it calls."""
    for (q, k, v, grad), sequences, softcap in cases(kernel):
        kernel.check(q)
        wanted = Sdpa().forward(q, k, v, sequences, SCALE, softcap)
        found = kernel.forward(q, k, v, sequences, SCALE, softcap)
        assert [x.shape for x in found] == [q.shape, q.shape[:2]]
        assert all(map(torch.equal, found, wanted))
        if backward:
            # A log-sum-exp of more than this call's keys, as the merged one is.
            state = grad, q, k, v, wanted[0], wanted[1] + 0.5, sequences, SCALE, softcap
            gradients = kernel.backward(*state)
            assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
            assert all(map(torch.equal, gradients, Sdpa().backward(*state)))


@pytest.fixture
def library() -> Iterator[Callable[[str, str], Library]]:
    """Libraries of operators that go when the test ends."""
    made: list[Library] = []

    def make(namespace: str, kind: str) -> Library:
        made.append(Library(namespace, kind))
        return made[-1]

    yield make
    for each in made:
        each._destroy()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[Any],
    causal: bool,
    scale: float,
    left: int = -1,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The CPU's kernel; lengths as GPU kernels want them."""
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in lengths[:2])
    assert lengths[2:] == [int(x.diff().max()) for x in lengths[:2]]
    return Sdpa().forward(q, k, v, Sequences(*lengths, causal, left), scale, softcap)


def differentiate(
    tensors: list[Tensor], lengths: list[Any], causal: bool, scale: float, left: int = -1, softcap: float = 0.0
) -> tuple[Tensor, ...]:
    """Likewise. tensors: gradient of the output, q, k, v, output, log-sum-exp [rows, heads]."""
    assert tensors[-1].dtype == torch.float32
    return Sdpa().backward(*tensors, Sequences(*lengths, causal, left), scale, softcap)


def bound(schema: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """What an implementation was given, by name, with the defaults that the dispatcher leaves out."""
    known = torch._C.parse_schema(schema).arguments
    given = {x.name: x.default_value for x in known}
    return given | dict(zip(given, arguments, strict=False)) | options


# --- torch's operators, behind their real schemas


def test_torch_flash(library: Callable[[str, str], Library]) -> None:
    aten = library("aten", "IMPL")

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float, **options: Any) -> tuple[Tensor, ...]:
        *lengths, dropout, causal, debug_mask = rest
        left = options.pop("window_size_left")
        assert (dropout, debug_mask, set(options.values()) - {None}) == (0.0, False, set())
        out, lse = attend(q, k, v, lengths, causal, scale, left)
        return out, lse.t().contiguous(), torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(*arguments: Any, scale: float, **options: Any) -> tuple[Tensor, ...]:
        *tensors, lse = arguments[:6]
        *lengths, dropout, causal, state, unused = arguments[6:]
        left = options.pop("window_size_left")
        assert (dropout, set(options.values()) - {None}, unused.numel()) == (0.0, set(), 0)
        assert state.dtype == torch.uint64
        assert lse.is_contiguous()
        assert torch.are_deterministic_algorithms_enabled()
        return differentiate([*tensors, lse.t()], lengths, causal, scale, left)

    aten.impl("_flash_attention_forward", forward, "CPU")
    aten.impl("_flash_attention_backward", backward, "CPU")
    check_like_the_cpu(KERNELS["torch_flash"])
    assert not torch.are_deterministic_algorithms_enabled()


def test_cudnn(library: Callable[[str, str], Library], monkeypatch: pytest.MonkeyPatch) -> None:
    aten = library("aten", "IMPL")

    def forward(*arguments: Any, **options: Any) -> tuple[Any, ...]:
        given = bound(str(torch.ops.aten._cudnn_attention_forward.default._schema), arguments, options)
        q, k, v = (given.pop(name) for name in ("query", "key", "value"))
        lengths = [given.pop(name) for name in LENGTHS]
        causal, scale = given.pop("is_causal"), given.pop("scale")
        assert given.pop("compute_log_sumexp")
        assert not any(given.values())
        assert all(x.is_contiguous() for x in (q, k, v))
        out, lse = attend(q, k, v, lengths, causal, scale)
        empty = torch.empty(0)
        return out, lse[..., None], *lengths, empty, empty, empty

    def backward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        given = bound(str(torch.ops.aten._cudnn_attention_backward.default._schema), arguments, options)
        *tensors, lse = (given.pop(x) for x in ("grad_out", "query", "key", "value", "out", "logsumexp"))
        lengths = [given.pop(name) for name in LENGTHS]
        causal, scale = given.pop("is_causal"), given.pop("scale")
        assert given.pop("philox_seed").dtype == given.pop("philox_offset").dtype == torch.int64
        assert not any(given.values())
        assert all(x.is_contiguous() for x in (*tensors, lse))
        return differentiate([*tensors, lse.squeeze(-1)], lengths, causal, scale)

    aten.impl("_cudnn_attention_forward", forward, "CPU")
    aten.impl("_cudnn_attention_backward", backward, "CPU")
    monkeypatch.setattr(cudnn, "_FIRST_WITH_BACKWARD", (2, 11))
    assert KERNELS["cudnn"].no_backward() == ""
    check_like_the_cpu(KERNELS["cudnn"])


def test_cudnn_has_no_backward_before_torch_mended_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, missing in (("2.11.0+cu130", True), ("2.13.0", True), ("2.14.0a0+git", False), ("3.0.1", False)):
        monkeypatch.setattr(torch, "__version__", version)
        assert bool(KERNELS["cudnn"].no_backward()) == missing


# --- packages: their published signatures


@pytest.mark.parametrize("namespace", ["flash_attn_3", "fa3_fwd"])
def test_flash_attention_3(
    namespace: str, library: Callable[[str, str], Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    definitions, operators = library(namespace, "DEF"), library(namespace, "IMPL")

    def how(given: dict[str, Any]) -> tuple[Any, ...]:
        lengths = [given[name] for name in Sequences._fields[:4]]
        return lengths, *(given[name] for name in ("is_causal", "softmax_scale", "window_size_left", "softcap"))

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        given = bound(FA3_FORWARD, arguments, {})
        assert given["num_splits"] == 1
        assert given["window_size_right"] == -1
        out, lse = attend(given["q"], given["k"], given["v"], *(how(given)))
        return out, lse.t().contiguous(), torch.empty(0), torch.empty(0)

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        given = bound(FA3_BACKWARD, arguments, {})
        *tensors, lse = (given[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse"))
        assert given["deterministic"]
        assert given["window_size_right"] == -1
        assert lse.is_contiguous()
        gradients = differentiate([*tensors, lse.t()], *how(given))
        for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
            given[name].copy_(gradient)
        return (torch.empty(0),) * 5

    for schema, function in ((FA3_FORWARD, forward), (FA3_BACKWARD, backward)):
        definitions.define(schema)
        operators.impl(schema.split("(")[0], function, "CPU")
    module = {"flash_attn_3": "flash_attn_interface", "fa3_fwd": "fa3_fwd_interface"}[namespace]
    monkeypatch.setitem(sys.modules, module, SimpleNamespace())
    kernel = FlashAttention3()
    forward_only = namespace == "fa3_fwd"
    assert bool(kernel.no_backward()) == kernel.forward_only == forward_only
    check_like_the_cpu(kernel, backward=not forward_only)
    half = cases(kernel)[0][0][0].half()
    if forward_only:
        with pytest.raises(ValueError, match=r"q is torch\.float16: fa3-fwd, .* expects torch\.bfloat16$"):
            kernel.check(half)
    else:
        kernel.check(half)


class FA4:
    """The part that we call of `flash_attn/cute/interface.py`: signatures of flash-attn-4 4.0.0b36."""

    # fmt: off
    @staticmethod
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None,
        mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None,
        aux_scalars=None, q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None,
        scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
        gather_bwd_recompute_p=False,
    ):
        assert return_lse
        assert window_size_right is None
        lengths = [cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k]
        left = -1 if window_size_left is None else window_size_left
        out, lse = attend(q, k, v, lengths, causal, softmax_scale, left, softcap)
        return out, lse.t().contiguous(), None, None, None

    @staticmethod
    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
        learnable_sink=None,
    ):
        assert deterministic
        assert window_size_right is None
        assert lse.is_contiguous()
        lengths = [cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k]
        left = -1 if window_size_left is None else window_size_left
        return differentiate([dout, q, k, v, out, lse.t()], lengths, causal, softmax_scale, left, softcap)
    # fmt: on


@pytest.mark.parametrize("capped", [False, True])
def test_flash_attention_4(capped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = SimpleNamespace(create_softcap_scoremod_bwd=None) if capped else SimpleNamespace()
    monkeypatch.setattr(FA4, "utils", utils, raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", FA4)
    assert FlashAttention4().has_softcap() == capped
    check_like_the_cpu(FlashAttention4())


# --- where they run


def test_nothing_for_gpus_runs_where_there_is_none() -> None:
    for device in ("cuda", "cpu", "meta"):
        found = [kernel.name for kernel in KERNELS.values() if kernel.is_available(torch.device(device))]
        assert found == (["sdpa"] if device == "cpu" else [])


@pytest.mark.parametrize(
    ("chip", "wanted"),
    [
        ((7, 5), []),
        ((8, 0), ["torch_flash", "cudnn"]),
        ((9, 0), ["flash_attention_3", "flash_attention_4", "torch_flash", "cudnn"]),
        ((10, 0), ["flash_attention_4", "torch_flash", "cudnn"]),
        ((12, 0), ["torch_flash", "cudnn"]),
    ],
)
def test_chips_and_what_runs_on_them(chip: tuple[int, int], wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All packages installed, on a machine whose GPU says that it is this chip."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chip)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(FlashAttention3, "operators", object())
    monkeypatch.setattr(FlashAttention4, "interface", object())
    device = torch.device("cuda")
    assert [kernel.name for kernel in KERNELS.values() if kernel.is_available(device)] == wanted


def test_torchs_switch_is_put_back() -> None:
    for before in (False, True):
        torch.use_deterministic_algorithms(before, warn_only=before)
        try:
            with deterministic():
                assert torch.are_deterministic_algorithms_enabled()
                assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.are_deterministic_algorithms_enabled() == before
            assert torch.is_deterministic_algorithms_warn_only_enabled() == before
            assert torch.utils.deterministic.fill_uninitialized_memory
        finally:
            torch.use_deterministic_algorithms(False)
