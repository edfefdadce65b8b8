"""Batched matmuls in Triton as engines have them, for comparison: FP4 weights by tl.dot_scaled, and FP8 W8A8.

All compute y[m, h, :] = x[m, h, :] @ W[h]^T for W [H, N, K], written as W @ x^T where not said otherwise, so that a
small batch lies along the dot's narrow side. Imported only where triton is.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit(do_not_specialize=["M"])
def dot_scaled_bmm(
    x,
    w,
    scales,
    y,
    M,
    x_stride,
    x_head,
    y_stride,
    y_head,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """bf16 x, e2m1 codes [H, N, K/2] with e8m0 scales [H, N, K/32]."""
    head = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    live = tokens[None, :] < M
    x_at = x + head * x_head + tokens[None, :] * x_stride + tl.arange(0, BK)[:, None]
    w_at = w + head * (N * (K // 2)) + rows[:, None] * (K // 2) + tl.arange(0, BK // 2)[None, :]
    s_at = scales + head * (N * (K // 32)) + rows[:, None] * (K // 32) + tl.arange(0, BK // 32)[None, :]
    total = tl.zeros((BN, BM), tl.float32)
    for _ in range(0, K // BK):
        tile = tl.load(x_at, mask=live, other=0.0)
        total = tl.dot_scaled(tl.load(w_at), tl.load(s_at), "e2m1", tile, None, "bf16", acc=total, fast_math=True)
        x_at += BK
        w_at += BK // 2
        s_at += BK // 32
    tl.store(y + head * y_head + tokens[None, :] * y_stride + rows[:, None], total.to(tl.bfloat16), mask=live)


@triton.jit(do_not_specialize=["M"])
def dot_scaled_left_bmm(
    x,
    w,
    scales,
    y,
    M,
    x_stride,
    x_head,
    y_stride,
    y_head,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The same product with x on the left, which suits large batches."""
    head = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    live = tokens[:, None] < M
    x_at = x + head * x_head + tokens[:, None] * x_stride + tl.arange(0, BK)[None, :]
    w_at = w + head * (N * (K // 2)) + rows[None, :] * (K // 2) + tl.arange(0, BK // 2)[:, None]
    s_at = scales + head * (N * (K // 32)) + rows[:, None] * (K // 32) + tl.arange(0, BK // 32)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K // BK):
        tile = tl.load(x_at, mask=live, other=0.0)
        total = tl.dot_scaled(tile, None, "bf16", tl.load(w_at), tl.load(s_at), "e2m1", acc=total, fast_math=True)
        x_at += BK
        w_at += BK // 2
        s_at += BK // 32
    tl.store(y + head * y_head + tokens[:, None] * y_stride + rows[None, :], total.to(tl.bfloat16), mask=live)


@triton.jit(do_not_specialize=["M"])
def w8a8_bmm(
    x,
    w,
    scales,
    y,
    M,
    x_stride,
    x_head,
    y_stride,
    y_head,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """e4m3 x, which someone else has quantised, and e4m3 w [H, N, K] with one float32 scale a head."""
    head = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    live = tokens[None, :] < M
    x_at = x + head * x_head + tokens[None, :] * x_stride + tl.arange(0, BK)[:, None]
    w_at = w + head * (N * K) + rows[:, None] * K + tl.arange(0, BK)[None, :]
    total = tl.zeros((BN, BM), tl.float32)
    for _ in range(0, K // BK):
        total = tl.dot(tl.load(w_at), tl.load(x_at, mask=live, other=0.0), total)
        x_at += BK
        w_at += BK
    total *= tl.load(scales + head)
    tl.store(y + head * y_head + tokens[None, :] * y_stride + rows[:, None], total.to(tl.bfloat16), mask=live)
