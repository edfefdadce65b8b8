"""Peers of fp4_bmm in torch, timed in a process of their own: cuBLAS bf16, Triton dot_scaled, Triton FP8 W8A8.

    python -m bench.matmul_peers [SECONDS]        prints one JSON object a line

"call_us" is the time of a node in a replayed CUDA graph of calls over distinct, cold weights: what a decode loop
pays, launch gaps included. "kernel_us" is the kernel's own time, as torch's profiler has it. Each Triton kernel is
tuned at every batch by trying all of its configs(). The operands lie as an engine has them: x of k_up is a part of
the query [B, H, P+R], its result a part of [B, H, L+R].
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from typing import Any

H, P, V, L, R = 128, 128, 128, 512, 64
BATCHES = (1, 8, 16, 32, 64, 128, 256, 512)
ROTATED_BYTES = 200e6
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4, FP4_LEFT, FP8 = "triton dot_scaled", "triton dot_scaled, x left", "triton w8a8"
TRITON = (FP4, FP4_LEFT, FP8)


@dataclasses.dataclass(frozen=True)
class Op:
    """One of the two products: W [H, N, K], and the rows that x and y are parts of."""

    name: str
    N: int
    K: int
    x_width: int
    y_width: int


OPS = (Op("k_up", L, P, P + R, L + R), Op("v_up", V, L, L, V))


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of a Triton kernel."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


def configs(op: Op, batch: int) -> list[Config]:
    """What is tried: the tokens in one tile where they fit, or two, and all that is sensible around it."""
    found = []
    largest = min(128, max(16, 1 << (batch - 1).bit_length()))
    for BM, BN, BK, num_warps in itertools.product(
        sorted({largest, max(16, largest // 2)}), (64, 128, 256), (128, 256), (4, 8)
    ):
        stages = (2,) if op.K == 128 else (2, 3) if BK == 256 else (2, 4) if BM < 64 else (3,)
        fits = BN <= op.N and BK <= op.K and not (BN == 256 and (BK == 256 or BM > 128))
        balanced = (num_warps == 4 or BN >= 128) and (num_warps == 8 or BM * BN < 128 * 128)
        if fits and balanced:
            found += [Config(BM, BN, BK, num_warps, num_stages) for num_stages in stages]
    return found


def kernel_of(name: str):
    from bench import triton_peers

    return {
        FP4: triton_peers.dot_scaled_bmm,
        FP4_LEFT: triton_peers.dot_scaled_left_bmm,
        FP8: triton_peers.w8a8_bmm,
    }[name]


def strides(name: str, op: Op) -> tuple[int, int, int, int]:
    """Elements from token to token and head to head, of x and of y; FP8 x is a tensor of its own."""
    width = op.K if name == FP8 else op.x_width
    return H * width, width, H * op.y_width, op.y_width


def compile_one(job: tuple[str, Op, Config]) -> bool:
    """Into Triton's cache on disk; False for a configuration that does not compile."""
    import torch  # pyright: ignore[reportMissingImports]
    from triton.runtime.jit import MockTensor  # pyright: ignore[reportMissingImports]

    name, op, config = job
    x, w, scales = (
        (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float32)
        if name == FP8
        else (torch.bfloat16, torch.uint8, torch.uint8)
    )
    operands = [MockTensor(dtype) for dtype in (x, w, scales, torch.bfloat16)]
    try:
        kernel_of(name).warmup(
            *operands, 7, *strides(name, op), N=op.N, K=op.K, grid=(1,), **dataclasses.asdict(config)
        )
    except Exception:  # of the compiler, whose kinds are many
        return False
    return True


class Weights:
    """Distinct weights of one product in three formats with the same values, and exact ones for the gate.

    The values are those of MXFP4 codes under power-of-two scales, which bf16 and e4m3 hold exactly as well: all peers
    give the same, exact result for small integers x.
    """

    def __init__(self, op: Op):
        import torch  # pyright: ignore[reportMissingImports]

        self.torch = torch
        packed_bytes = H * op.N * op.K * 17 // 32
        copies = {FP4: packed_bytes, FP8: H * op.N * op.K, "cublas bf16": 2 * H * op.N * op.K}
        codes = torch.randint(0, 16, (H, op.N, op.K), device="cuda", dtype=torch.uint8)
        exponents = torch.randint(-1, 2, (H, op.N, op.K // 32), device="cuda", dtype=torch.int32)
        magnitudes = torch.tensor(FP4_VALUES, device="cuda")[(codes & 7).long()]
        values = torch.where(codes > 7, -magnitudes, magnitudes) * torch.exp2(exponents.repeat_interleave(32, 2))
        packed, scales = codes[..., 0::2] | (codes[..., 1::2] << 4), (exponents + 127).to(torch.uint8)
        self.values = values.double()
        ones = torch.ones(H, device="cuda")
        one = {
            FP4: (packed, scales),
            FP8: (values.to(torch.float8_e4m3fn), ones),
            "cublas bf16": (values.to(torch.bfloat16),),
        }
        self.sets = {
            name: [tuple(part.clone() for part in one[name]) for _ in range(-(-int(ROTATED_BYTES) // size))]
            for name, size in copies.items()
        }


def calls_of(name: str, op: Op, weights: Weights, x, y, config: Config | None) -> list:
    """One call for each weight of the rotation."""
    torch = weights.torch
    if config is None:
        xt, yt = x[..., : op.K].transpose(0, 1), y[..., : op.N].transpose(0, 1)
        return [functools.partial(torch.bmm, xt, w.transpose(1, 2), out=yt) for (w,) in weights.sets["cublas bf16"]]
    kernel: Any = kernel_of(name)
    grid = (H, op.N // config.BN, -(-x.shape[0] // config.BM))
    operand = x[..., : op.K].to(torch.float8_e4m3fn).contiguous() if name == FP8 else x

    def call(w, scales):
        kernel[grid](
            operand, w, scales, y, x.shape[0], *strides(name, op), N=op.N, K=op.K, **dataclasses.asdict(config)
        )

    return [functools.partial(call, *both) for both in weights.sets[FP8 if name == FP8 else FP4]]


def graph_us(torch, calls: list) -> float:
    """Median time of a node over replays of one graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    with torch.cuda.stream(stream):
        graph.replay()
        for _ in range(15):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def profiled_us(torch, calls: list) -> float:
    """Mean of the kernels' own time over the rotation."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls:
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / len(calls)


def measure(name: str, op: Op, weights: Weights, batch: int, usable: set) -> dict[str, object]:
    """One row: every configuration is gated, the fastest that passes is reported."""
    torch = weights.torch
    x = torch.randint(-2, 3, (batch, H, op.x_width), device="cuda").to(torch.bfloat16)
    reference = torch.einsum("bhk,hnk->bhn", x[..., : op.K].double(), weights.values).to(torch.bfloat16)
    tried = [None] if name == "cublas bf16" else [c for c in configs(op, batch) if (name, op, c) in usable]
    times = {}
    for config in tried:
        y = torch.zeros(batch, H, op.y_width, device="cuda", dtype=torch.bfloat16)
        calls = calls_of(name, op, weights, x, y, config)
        calls[0]()
        if torch.equal(y[..., : op.N], reference):
            times[config] = graph_us(torch, calls), calls
    if not times:
        return {"name": name, "op": op.name, "batch": batch, "error": "no configuration gives the exact result"}
    best = min(times, key=lambda config: times[config][0])
    return {
        "name": name,
        "op": op.name,
        "batch": batch,
        "call_us": round(times[best][0], 3),
        "kernel_us": round(profiled_us(torch, times[best][1]), 3),
        "config": None if best is None else dataclasses.asdict(best),
        "configs": len(times),
    }


def main(seconds: float) -> None:
    """Compile everything on all cores, then time, most important batches first."""
    start = time.monotonic()
    jobs = list(
        dict.fromkeys((name, op, c) for op in OPS for name in TRITON for batch in BATCHES for c in configs(op, batch))
    )
    with multiprocessing.get_context("spawn").Pool() as pool:
        compiled = pool.map(compile_one, jobs, chunksize=2)
    usable = {job for job, good in zip(jobs, compiled, strict=True) if good}
    print(
        json.dumps({"compiled": len(usable), "of": len(jobs), "seconds": round(time.monotonic() - start)}),
        flush=True,
    )
    for op in OPS:
        weights = Weights(op)
        for batch in BATCHES:
            for name in (*TRITON, "cublas bf16"):
                if time.monotonic() - start > seconds:
                    print(
                        json.dumps({"name": name, "op": op.name, "batch": batch, "error": "out of time"}), flush=True
                    )
                    continue
                print(json.dumps(measure(name, op, weights, batch, usable)), flush=True)
        del weights


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 600)
