"""What the compilers make of the shipped configurations, without a GPU: registers, spills, tensor cores, shared memory.

A sample of the table; `make kernels` builds all of it.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from math import prod
from typing import Any

import pytest

from flashcp.kernels.ahead import TARGETS, TRANSFERS, Build, build, build_hopper_backward, build_rows, build_transfer
from flashcp.kernels.launch import PROGRAMS_PER_SM
from flashcp.kernels.tuning import DTYPES, HEAD_DIMS, LATENT_DIM, SHARED_BYTES, TABLE, Blocks, Pass, table_dim

pytest.importorskip("triton")
F, KV, Q = Pass


def entries(arch: str, head_dim: int, dtype: str) -> list[tuple[Pass, str, int, str, Blocks]]:
    """Every kernel the table ships for an architecture, head_dim and dtype."""
    size = 4 if dtype == "float32" else 2
    return [
        (which, arch, head_dim, dtype, blocks)
        for which in Pass
        for blocks in dict.fromkeys(TABLE[arch, table_dim(head_dim), size, which])
    ]


def long_only(arch: str, head_dim: int, dtype: str) -> list[tuple[Pass, str, int, str, Blocks]]:
    size = 4 if dtype == "float32" else 2
    return [(which, arch, head_dim, dtype, TABLE[arch, table_dim(head_dim), size, which][0]) for which in Pass]


HOPPER = [*entries("sm_90", 128, "bfloat16"), *entries("sm_90", 64, "bfloat16"), *entries("sm_90", 128, "float16")]
OTHERS = [
    *long_only("sm_90", 128, "float32"),
    *long_only("sm_80", 128, "bfloat16"),
    *long_only("sm_100", 128, "bfloat16"),
    *long_only("gfx942", 128, "bfloat16"),
    *long_only("sm_90", 80, "float16"),
    *long_only("sm_90", 256, "bfloat16"),
    (F, "sm_80", 64, "float16", TABLE["sm_80", 64, 2, F][0]),
    (F, "sm_100", 64, "float32", TABLE["sm_100", 64, 4, F][0]),
    (KV, "sm_100", 16, "bfloat16", TABLE["sm_100", 16, 2, KV][0]),
    (Q, "gfx942", 32, "float16", TABLE["gfx942", 32, 2, Q][0]),
]


@cache
def built(which: Pass, arch: str, head_dim: int, dtype: str, blocks: Blocks) -> Build:
    return build(which, arch, head_dim, dtype, blocks)


def name(case: tuple[Pass, str, int, str, Blocks]) -> str:
    which, arch, head_dim, dtype, b = case
    return f"{arch}-{head_dim}-{dtype}-{which.value}-{b.block_m}x{b.block_n}"


def test_the_table_is_whole() -> None:
    keys = product(TARGETS, HEAD_DIMS, (2, 4), Pass)
    latents = product(("sm_80", "sm_90", "sm_100"), (LATENT_DIM,), (2,), Pass)
    assert set(TABLE) == {*keys, *latents}
    assert set(SHARED_BYTES) == set(TARGETS)
    assert set(DTYPES) == {"float32", "float16", "bfloat16"}


@pytest.mark.parametrize("case", [*HOPPER, *OTHERS], ids=name)
def test_fits_the_chip(case: tuple[Pass, str, int, str, Blocks]) -> None:
    found = built(*case)
    assert 0 < found.shared_bytes <= SHARED_BYTES[case[1]]
    assert found.registers > 0
    if case[3] != "float32":
        assert found.spilled_bytes == 0
        assert found.wgmma + found.tcgen05 + found.mma > 0
        if case[1] != "gfx942":
            assert found.async_copies > 0


@pytest.mark.parametrize("case", HOPPER, ids=name)
def test_on_hopper_nothing_spills_and_all_runs_on_wgmma(case: tuple[Pass, str, int, str, Blocks]) -> None:
    found = built(*case)
    assert found.spilled_bytes == 0
    assert found.wgmma > 0
    assert found.mma == 0
    assert found.async_copies > 0


@pytest.mark.parametrize("which", Pass)
def test_the_second_launch_over_shared_tiles_compiles(which: Pass) -> None:
    """It may spill: without a NaN it ends before its first tile."""
    found = build(which, "sm_90", 128, "bfloat16", TABLE["sm_90", 128, 2, which][0], apart=True)
    assert found.shared_bytes <= SHARED_BYTES["sm_90"]
    assert found.wgmma > 0


MASKS = {
    "masks": {"intervals": True},
    "masks and softcap": {"intervals": True, "softcap": True, "parallel": True, "group": 4},
    "second launch, 192 and 128": {"intervals": True, "softcap": True, "apart": True, "v_dim": 128},
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("arch", "which"), list(product(("sm_90", "sm_80"), Pass)))
def test_masks_softcap_and_two_head_dims_compile(arch: str, which: Pass, kind: str) -> None:
    """dK and dV spill a little to mask; the second launch ends before its first tile without a NaN."""
    head_dim = 192 if "v_dim" in MASKS[kind] else 128
    found = build(which, arch, head_dim, "bfloat16", TABLE[arch, table_dim(head_dim), 2, which][0], **MASKS[kind])
    assert 0 < found.shared_bytes <= SHARED_BYTES[arch]
    assert found.wgmma + found.mma > 0
    assert "apart" in MASKS[kind] or found.spilled_bytes <= 64 * (which is KV)


@pytest.mark.parametrize(
    "kind", [{}, {"v_dim": 512, "intervals": True}, {"parallel": True, "intervals": True}], ids=str
)
@pytest.mark.parametrize("which", Pass)
def test_latents_fit_the_chip(which: Pass, kind: dict[str, Any]) -> None:
    """Keys of 576 columns and values of 512, or padded to as many; dK and dV may spill a little."""
    found = build(which, "sm_90", LATENT_DIM, "bfloat16", TABLE["sm_90", LATENT_DIM, 2, which][0], **kind)
    assert 0 < found.shared_bytes <= SHARED_BYTES["sm_90"]
    assert found.mma > 0
    assert found.spilled_bytes <= 64 * (which is KV)


def test_the_log_sum_exp_of_the_key_gradients_is_loaded_a_block_ahead() -> None:
    """Beside K, V and two stages of Q and dO tiles shared memory holds a block of it: no product waits for it."""
    blocks = TABLE["sm_90", 128, 2, KV][0]
    rows = 2 * blocks.block_n + 2 * blocks.stages * blocks.block_m
    assert built(KV, "sm_90", 128, "bfloat16", blocks).shared_bytes >= 2 * 128 * rows + 4 * blocks.block_m


def test_grouped_heads_spill_nothing_either() -> None:
    for case in entries("sm_90", 128, "bfloat16"):
        assert build(*case, group=4).spilled_bytes == 0


def products(found: Build) -> int:
    """Numbers that the tensor-core instructions of a kernel multiply, one each."""
    shapes = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", found.listing)
    return sum(prod(map(int, shape)) for shape in shapes)


@pytest.mark.parametrize(("head_dim", "which"), list(product((80, 96), Pass)))
def test_tensor_cores_compute_no_column_that_is_not_there(head_dim: int, which: Pass) -> None:
    blocks = TABLE["sm_90", head_dim, 2, which][0]
    some, all_of_them = (built(which, "sm_90", dim, "bfloat16", blocks) for dim in (head_dim, 128))
    assert 128 * products(some) == head_dim * products(all_of_them) > 0
    assert some.spilled_bytes == 0
    assert some.shared_bytes < 0.8 * all_of_them.shared_bytes


@pytest.mark.parametrize(("head_dim", "which"), list(product((80, 128), (F, Q))))
def test_heads_that_share_a_tile_cost_the_loops_nothing(head_dim: int, which: Pass) -> None:
    for blocks in dict.fromkeys(TABLE["sm_90", head_dim, 2, which]):
        case = which, "sm_90", head_dim, "bfloat16", blocks
        alone, together = built(*case), build(*case, group=4, tile_heads=4)
        assert together.spilled_bytes == 0
        for field in ("wgmma", "async_copies", "shared_bytes"):
            assert getattr(together, field) == getattr(alone, field)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_context_parallel_variants_spill_nothing_either(head_dim: int) -> None:
    """A forward that goes on from earlier ranges, and local gradients in fp32, for others' shares are added to them."""
    for case in entries("sm_90", head_dim, "bfloat16"):
        assert build(*case, parallel=True).spilled_bytes == 0


@pytest.mark.parametrize("head_dim", [16, 80, 256])
@pytest.mark.parametrize("arch", TARGETS)
def test_the_kernel_before_the_gradients_spills_nothing(arch: str, head_dim: int) -> None:
    for dtype in ("bfloat16", "float32"):
        found = build_rows(arch, head_dim, dtype)
        assert found.registers > 0
        assert found.spilled_bytes == 0
        assert found.shared_bytes <= SHARED_BYTES[arch]


FUSED = [
    *(
        (arch, dim, "bfloat16", blocks)
        for arch, dim in (("sm_90", 128), ("sm_90", 64))
        for blocks in TABLE[arch, dim, 2, F]
    ),
    *((arch, 128, "bfloat16", TABLE[arch, 128, 2, F][0]) for arch in ("sm_80", "gfx942")),
]


@pytest.mark.parametrize("case", FUSED, ids=lambda case: name((F, *case)))
def test_waiting_costs_the_forward_nothing(case: tuple[str, int, str, Blocks]) -> None:
    plain, fused = built(F, *case), build(F, *case, fused=True)
    assert fused.spilled_bytes == 0
    for field in ("wgmma", "mma", "async_copies", "shared_bytes"):
        assert getattr(fused, field) == getattr(plain, field)
    if case[0] != "gfx942":  # its programs share their tiles: as many as fit beside each other, and no more than these
        warps = case[3].warps
        assert fused.registers * 32 * warps * PROGRAMS_PER_SM[warps] <= 65_536
    looks = "buffer_inv sc0 sc1" if case[0] == "gfx942" else "ld.global.sys.acquire"
    assert looks in fused.listing
    assert looks not in plain.listing


@pytest.mark.parametrize("arch", ["sm_90", "sm_80", "gfx942"])
def test_kernels_beside_attention_compile(arch: str) -> None:
    for which in TRANSFERS:
        found = build_transfer(which, arch, 128, "bfloat16")
        assert found.spilled_bytes == 0
        assert found.registers <= 64


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_rows_are_packed_16_bytes_at_a_time(arch: str) -> None:
    listing = build_transfer("pack", arch, 128, "bfloat16").listing
    assert "ld.global.v4.b32" in listing
    assert "st.global.v4.b32" in listing


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_a_flag_is_read_by_one_thread_for_all(arch: str) -> None:
    """Looking compiles to a load, by one thread; the others wait for what it saw."""
    wait = build_transfer("wait", arch, 128, "bfloat16").listing
    for look in re.finditer(r"(@%p\d+ )?ld\.global\.sys\.acquire.*\n.*st\.shared.*\n.*bar\.sync", wait):
        assert look[1]
    assert len(re.findall(r"ld\.global\.sys\.acquire", wait)) == 3
    assert "volatile" not in wait


def test_table_of_what_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{'kernel':<48} {'registers':>9} {'spilled B':>9} {'shared B':>9} {'tensor-core':>11} {'async':>6}"]
    for case in [*HOPPER, *OTHERS]:
        b = built(*case)
        matrix = b.wgmma + b.tcgen05 + b.mma
        numbers = f"{b.registers:>9} {b.spilled_bytes:>9} {b.shared_bytes:>9} {matrix:>11} {b.async_copies:>6}"
        lines.append(f"{name(case):<48} {numbers}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert len(lines) == 1 + len(HOPPER) + len(OTHERS)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_one_backward_kernel_on_hopper(head_dim: int, parallel: bool) -> None:
    """Five products a block of pairs, all on wgmma. What little it spills it spills beside its loops or to mask."""
    found = build_hopper_backward(head_dim, "bfloat16", 4, parallel)
    assert found.shared_bytes <= SHARED_BYTES["sm_90"]
    assert found.registers <= 168
    assert found.spilled_bytes <= 64
    assert products(found) == 5 * 64 * 128 * head_dim
    assert found.listing.count("add.v4.f32") == head_dim // 4, "additions to dQ of 16 bytes, masked and not"
