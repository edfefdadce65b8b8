"""Compile every configuration of the Mosaic decode kernel for an H100 that need not be there; print what ptxas says.

With the argument "all" these are ALL_CONFIGS. Run by test_mla_decode_compile.py in a process of its own, because the
dump folder is read from the environment once.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import sys
import tempfile

BF16, E4M3 = "bfloat16", "float8_e4m3fn"
CONFIGS = [
    # B, T, H, capacity, page size (0: contiguous), split size, and the cache's dtype
    (4, 1, 128, 4096, 0, 2048, BF16),
    (4, 1, 128, 4096, 0, 4096, BF16),
    (4, 1, 128, 4096, 64, 2048, BF16),
    (4, 1, 128, 4096, 64, 4096, BF16),
    (4, 1, 128, 4096, 128, 2048, BF16),
    (4, 1, 128, 4096, 16, 2048, BF16),
    (4, 1, 64, 4096, 64, 2048, BF16),
    (4, 1, 32, 4096, 64, 4096, BF16),
    (4, 3, 20, 4096, 128, 2048, BF16),
    (4, 1, 16, 4096, 64, 1024, BF16),
    (4, 1, 8, 4096, 16, 4096, BF16),
    (4, 8, 128, 4096, 64, 2048, BF16),
    (4, 1, 128, 4096, 0, 2048, E4M3),
    (4, 1, 128, 4096, 64, 4096, E4M3),
    (4, 1, 16, 4096, 64, 2048, E4M3),
    (4, 1, 16, 4096, 16, 2048, E4M3),
    (4, 8, 20, 4096, 128, 4096, E4M3),
]
# All that a layer may ask for: every H a device, T of 1 and 8, every cache; with splits and without in turn.
ALL_CONFIGS = [
    (2, tokens, heads, 1024, page, (512, 1024)[(page // 16 + heads // 4 + (dtype == E4M3)) % 2], dtype)
    for tokens, heads, page, dtype in itertools.product(
        (1, 8), (8, 16, 20, 32, 64, 128), (0, 16, 64, 128), (BF16, E4M3)
    )
]


def main() -> None:
    folder = pathlib.Path(tempfile.mkdtemp())
    os.environ.update(
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
        JAX_PLATFORMS="cpu",
        MOSAIC_GPU_DUMP_TO=str(folder),
        MOSAIC_GPU_DUMP_PTXAS="1",
    )
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from pallas_kernels.backend import abstract_gpu
    from pallas_kernels.mla_decode_mosaic_gpu import mla_decode_mosaic_gpu

    config = (pathlib.Path(__file__).parent / "data" / "h100_target_config.txt").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())

    def shape(dims, dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    results = []
    for batch, tokens, heads, capacity, page, split_size, dtype in ALL_CONFIGS if "all" in sys.argv else CONFIGS:
        for old in folder.iterdir():
            old.unlink()
        columns = capacity // page if page else 0
        entries = (batch * columns, page, 576) if page else (batch, capacity, 576)
        operands = [shape((batch, tokens, heads, 576), jnp.bfloat16), shape(entries, jnp.dtype(dtype))]
        operands += [shape((batch, columns), jnp.int32)] if page else []
        operands += [shape((batch, tokens), jnp.int32), shape((batch,), jnp.int32)]

        def call(q, entries, *rest, paged=bool(page), split_size=split_size):
            *table, visible, length = rest
            table = table[0] if paged else None
            return mla_decode_mosaic_gpu(q, entries, table, visible, length, scale=0.07, split_size=split_size)

        with abstract_gpu():
            compiled = jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",)).compile()
        (report,) = [path.read_text() for path in folder.glob("*.ptxas")]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert spills is not None, report
        results.append(
            {
                "spill_stores": int(spills[1]),
                "spill_loads": int(spills[2]),
                "serialised": bool(re.search("C751[0-9]", report)),
                "ignored_registers": "C7508" in report,
                "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
            }
        )
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
