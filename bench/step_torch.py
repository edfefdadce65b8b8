"""The decode step of bench.step as an engine composes it: cuBLAS bf16 linears, bmm and FlashMLA in one CUDA graph.

    python -m bench.step_torch 128x32x4096 ...      heads x sequences x keys; prints one JSON object a line
    python -m bench.step_torch -                    the same for each line of standard input, as it comes

A process of its own; needs torch, and the wheel tokenspeed-flashmla for the attention, without which there is no
step. Norms, rotation and the cache write are torch's own kernels, as few as plain torch allows: engines fuse them.
"graph_us" is the time a layer takes in a replayed graph of several layers; "kernel_us" its kernels' own times.
"""

from __future__ import annotations

import json
import sys

E, Q, L, P, R, V, PAGE = 7168, 1536, 512, 128, 64, 128, 64


def measure(heads: int, batch: int, keys: int) -> dict[str, object]:
    """One row; random pages in random order."""
    import flash_mla  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

    def random(*shape, scale=1.0):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale

    def weight(*shape):
        return random(*shape, scale=shape[-1] ** -0.5)

    class Layer:
        def __init__(self):
            self.q_a, self.kv_a = weight(Q, E), weight(L + R, E)
            self.q_b, self.o = weight(heads * (P + R), Q), weight(E, heads * V)
            self.k_up, self.v_up = weight(heads, P, L), weight(heads, L, V)
            self.cache = random(batch * keys // PAGE, PAGE, 1, L + R)
            order = torch.randperm(batch * keys // PAGE, device="cuda", dtype=torch.int32)
            self.table = order.view(batch, -1).contiguous()
            self.slot = (self.table[:, -1].long() * PAGE + PAGE - 1).contiguous()
            self.plan = flash_mla.get_mla_metadata()[0]

    layers = [Layer() for _ in range(2 if heads == 128 else 6)]
    lengths = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
    x = random(batch, E)
    cos, sin = random(R // 2).float(), random(R // 2).float()
    ones = {n: torch.ones(n, device="cuda", dtype=torch.bfloat16) for n in (E, Q, L)}

    def norm(y):
        return F.rms_norm(y, y.shape[-1:], ones[y.shape[-1]], 1e-6)

    def rotate(y):
        a, b = y[..., 0::2].float(), y[..., 1::2].float()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(y.dtype)

    def step(x):
        for w in layers:
            normed = norm(x)
            q = (norm(normed @ w.q_a.T) @ w.q_b.T).view(batch, heads, P + R)
            kv = normed @ w.kv_a.T
            flat = w.cache.view(-1, L + R)
            flat.index_copy_(0, w.slot, torch.cat([norm(kv[:, :L]), rotate(kv[:, L:])], -1))
            query = torch.empty(batch, 1, heads, L + R, device="cuda", dtype=torch.bfloat16)
            latent = torch.bmm(q[..., :P].transpose(0, 1), w.k_up)
            query[:, 0, :, :L] = latent.transpose(0, 1)
            query[:, 0, :, L:] = rotate(q[..., P:])
            out = flash_mla.flash_mla_with_kvcache(
                query, w.cache, w.table, lengths, L, w.plan, None, softmax_scale=(P + R) ** -0.5, causal=False
            )[0]
            heads_out = torch.bmm(out[:, 0].transpose(0, 1), w.v_up).transpose(0, 1)
            x = x + heads_out.reshape(batch, -1) @ w.o.T
        return norm(x)

    compiled = torch.compile(step) if "--compile" in sys.argv else step
    for _ in range(3):
        compiled(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compiled(x)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(15):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(layers))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    seen = profile.key_averages()
    return {
        "graph_us": round(sorted(times)[7], 2),
        "kernel_us": round(sum(event.self_device_time_total for event in seen) / len(layers), 2),
        "launches": sum(event.count for event in seen) / len(layers),
    }


def main() -> None:
    """A row for every shape."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.zeros(1, device="cuda")
    print("ready", flush=True)
    shapes = sys.stdin if sys.argv[1:] == ["-"] else [text for text in sys.argv[1:] if "x" in text]
    for text in shapes:
        try:
            row = measure(*map(int, text.strip().split("x")))
        except Exception as error:  # one failure must not hide the other rows
            row = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        torch.cuda.empty_cache()  # the memory is the other process's again
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
