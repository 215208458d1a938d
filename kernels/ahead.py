"""Compile the kernels for a chip that is not here, and read what the compiler made of them.

Works on any machine: triton carries its own ptxas and cuobjdump. What cannot be known this way is time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashcp.kernels.backward_kv import backward_kv_kernel
from flashcp.kernels.backward_q import backward_q_kernel
from flashcp.kernels.backward_rows import ROWS, backward_rows_kernel
from flashcp.kernels.forward import forward_kernel
from flashcp.kernels.one_sided import wait_kernel
from flashcp.kernels.pack import BLOCK_ROWS, WARPS, pack_rows_kernel
from flashcp.kernels.tuning import Blocks, Pass

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {Pass.FORWARD: forward_kernel, Pass.BACKWARD_KV: backward_kv_kernel, Pass.BACKWARD_Q: backward_q_kernel}
TRANSFERS = {"pack": pack_rows_kernel, "wait": wait_kernel}
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_ROWS_OF = "the dtype that is asked for"
_TYPES = {
    **dict.fromkeys(("q", "k", "v", "k_received", "v_received", "packed"), _ROWS_OF),
    **dict.fromkeys(("out", "grad_out", "grad_q", "grad_k", "grad_v"), _ROWS_OF),
    **dict.fromkeys(("lse", "log_sum", "minus_delta", "grad_k_received", "grad_v_received"), "*fp32"),
    **dict.fromkeys(("table", "ranges", "reach", "mixed", "flags", "flag", "stuck"), "*i32"),
    **dict.fromkeys(("scale", "soften"), "fp32"),
    **dict.fromkeys(("tiles", "ready_tiles", "heads", "epoch", "spins", "count", "rows", "head_rows"), "i32"),
    "packed_half": "i32",
    "index": "*i64",
}  # fmt: skip
"""Types of the kernels' arguments; strides, whose names end in _row or _head, are i32."""
_STRIDE = re.compile(r"\w+_(row|head)")
_TOTALS = {"out", "grad_k", "grad_v"}


@dataclass(frozen=True)
class Build:
    """What a compiled kernel takes: registers a thread, spilled bytes a thread, shared memory of a block in bytes, and
    how many tensor-core (wgmma, tcgen05, mma), asynchronous-copy and plain instructions it holds. On AMD the
    assembler tells registers and spills; the rest is 0. listing: the program, as PTX or AMD's assembler."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: int
    tcgen05: int
    mma: int
    async_copies: int
    listing: str = field(default="", repr=False)


def build(
    which: Pass,
    target: str,
    head_dim: int,
    dtype: str,
    blocks: Blocks,
    group: int = 1,
    tile_heads: int = 1,
    parallel: bool = False,
    fused: bool = False,
    apart: bool = False,
    intervals: bool = False,
    softcap: bool = False,
    v_dim: int | None = None,
) -> Build:
    """Compile one kernel. target: a key of TARGETS. dtype: a name of `kernels/tuning.py`'s DTYPES.

    group: query heads a KV head. tile_heads: how many of them share a query tile. parallel: the variant under context
    parallelism: a forward that goes on from earlier ranges, dK and dV in fp32. fused: the forward that waits for rows.
    apart: the second launch over tiles that documents share. intervals: for schedules with masks.
    v_dim: head_dim of the values where it is another.
    """
    chosen = {"GROUP": group, "HEAD_DIM": head_dim, "V_DIM": v_dim or head_dim, "BLOCK_M": blocks.block_m,
              "BLOCK_N": blocks.block_n, "PRECISION": blocks.precision, "MERGE": parallel,
              "FUSED": fused, "APART": apart, "INTERVALS": intervals, "TILE_HEADS": tile_heads}  # fmt: skip
    if not fused:
        chosen |= {"flags": None, "stuck": None}
    if not softcap:
        chosen["soften"] = None
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return _compile(KERNELS[which], target, dtype, chosen, options, _TOTALS if parallel else set())


def build_rows(target: str, head_dim: int, dtype: str, intervals: bool = False) -> Build:
    """Compile what runs before the gradients (`kernels/backward_rows.py`). Arguments as for `build`."""
    chosen = {"HEAD_DIM": head_dim, "BLOCK_M": ROWS, "INTERVALS": intervals}
    return _compile(backward_rows_kernel, target, dtype, chosen, {})


def build_transfer(name: str, target: str, head_dim: int, dtype: str) -> Build:
    """Compile one of the kernels beside attention, a key of TRANSFERS, for rows of heads of `head_dim`."""
    chosen = {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_ROWS": BLOCK_ROWS}
    return _compile(TRANSFERS[name], target, dtype, chosen, {"num_warps": WARPS})


def build_hopper(head_dim: int, dtype: str, group: int = 1, merge: bool = False) -> Build:
    """Compile the forward of `kernels/hopper.py`. merge: it goes on from earlier ranges."""
    return read(compile_hopper(head_dim, dtype, group, merge), "sm_90")


def build_hopper_backward(head_dim: int, dtype: str, group: int = 1, parallel: bool = False) -> Build:
    """Compile the one backward kernel of `kernels/hopper_backward.py`. parallel: local gradients in fp32."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from flashcp.kernels import hopper_backward as hopper

    types = dict.fromkeys(("q", "grad_out"), _descriptor(hopper.BLOCK_M, head_dim, dtype))
    types |= dict.fromkeys(("k", "v", "k_received", "v_received"), _descriptor(hopper.BLOCK_N, head_dim, dtype))
    types |= dict.fromkeys(("grad_k", "grad_v"), "*fp32" if parallel else f"*{_DTYPES[dtype]}") | {"grad_q": "*fp32"}
    chosen = {"GROUP": group, "STAGES": hopper.STAGES}
    kernel = hopper.hopper_backward_kernel
    return read(_to_binary(GluonASTSource, kernel, "sm_90", dtype, chosen, hopper.OPTIONS, types), "sm_90")


def compile_hopper(head_dim: int, dtype: str, group: int = 1, merge: bool = False) -> triton.compiler.CompiledKernel:
    """See `build_hopper`."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from flashcp.kernels import hopper

    kernel = hopper.hopper_forward_kernel
    chosen = {"GROUP": group, "STAGES": hopper.STAGES, "MERGE": merge}
    types = dict.fromkeys(("k", "v", "k_received", "v_received"), _descriptor(hopper.BLOCK_N, head_dim, dtype))
    types["out"] = "*fp32" if merge else f"*{_DTYPES[dtype]}"
    return _to_binary(GluonASTSource, kernel, "sm_90", dtype, chosen, hopper.OPTIONS, types)


def _descriptor(rows: int, head_dim: int, dtype: str) -> str:
    """The type of a TMA descriptor whose blocks have so many rows."""
    import torch

    from flashcp.kernels.hopper import block_layout

    layout = block_layout(rows, head_dim, getattr(torch, dtype))
    return f"tensordesc<{_DTYPES[dtype]}[{rows}, 1, {head_dim}],{layout!r}>"


def _compile(
    kernel: Any,
    target: str,
    dtype: str,
    chosen: dict[str, Any],
    options: dict[str, int],
    totals: Set[str] = frozenset(),
) -> Build:
    """`totals` are tensors that are fp32 whatever the dtype. Raises ValueError for an argument of unknown type."""
    types = dict.fromkeys(totals, "*fp32")
    return read(_to_binary(ASTSource, kernel, target, dtype, chosen, options, types), target)


def _to_binary(
    make_source: Any,
    kernel: Any,
    target: str,
    dtype: str,
    chosen: dict[str, Any],
    options: dict[str, int],
    types: dict[str, str],
) -> triton.compiler.CompiledKernel:
    """types: of arguments that have other types than their names say."""
    signature, constexprs, attributes = {}, {}, {}
    any_value = {kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize}
    for index, name in enumerate(kernel.arg_names):
        if name in chosen:
            signature[name], constexprs[(index,)] = "constexpr", chosen[name]
            continue
        kind = types.get(name) or ("i32" if _STRIDE.fullmatch(name) else _TYPES.get(name))
        if kind is None:
            raise ValueError(f"argument {name!r} of {kernel.__name__}: expected a name that _TYPES or _STRIDE knows")
        signature[name] = kind.replace(_ROWS_OF, f"*{_DTYPES[dtype]}")
        if kind != "fp32" and not kind.startswith("tensordesc") and name not in any_value:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        make_source(kernel, signature, constexprs, attributes), target=TARGETS[target], options=options
    )


def read(compiled: triton.compiler.CompiledKernel, target: str) -> Build:
    """What a kernel compiled for `target` takes."""
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        return Build(_number(r"\.vgpr_count:\s+(\d+)", text), 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text), shared,
                     0, 0, text.count("v_mfma"), 0, text)  # fmt: skip
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Build(
        registers=_number(r"REG:(\d+)", usage),
        spilled_bytes=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        shared_bytes=shared,
        wgmma=ptx.count("wgmma.mma_async"),
        tcgen05=ptx.count("tcgen05.mma"),
        mma=ptx.count("mma.sync"),
        async_copies=ptx.count("cp.async.cg") + ptx.count("cp.async.ca"),
        listing=ptx,
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's listing holds no {pattern!r}")
    return int(match.group(1))
