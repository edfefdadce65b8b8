"""FlashMLA's paged decode attention, timed in a process of its own; needs torch and the wheel tokenspeed-flashmla.

    python -m bench.flashmla 128x32x4096 ...      heads x sequences x keys; prints one JSON object a line

"graph_us" is the time a call takes in a replayed CUDA graph of ten, launch gaps and their overlap included;
"kernel_us" the sum of its kernels' own times, as torch's profiler has it.
"""

from __future__ import annotations

import json
import sys

PAGE, L, D = 64, 512, 576
CALLS = 10


def measure(heads: int, batch: int, keys: int) -> dict[str, object]:
    """One row; random pages in random order."""
    import flash_mla  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    cache = random(batch * keys // PAGE, PAGE, 1, D)
    table = torch.randperm(batch * keys // PAGE, device="cuda", dtype=torch.int32).view(batch, -1).contiguous()
    lengths = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
    q, plan = random(batch, 1, heads, D) * 2, flash_mla.get_mla_metadata()[0]

    def call():
        return flash_mla.flash_mla_with_kvcache(
            q, cache, table, lengths, L, plan, None, softmax_scale=192**-0.5, causal=False
        )

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    kernel_us = sum(event.self_device_time_total for event in profile.key_averages()) / CALLS
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return {
        "name": "flashmla",
        "heads": heads,
        "batch": batch,
        "keys": keys,
        "kernel_us": round(kernel_us, 2),
        "graph_us": round(sorted(times)[3], 2),
    }


if __name__ == "__main__":
    for text in sys.argv[1:]:
        print(json.dumps(measure(*map(int, text.split("x")))), flush=True)
