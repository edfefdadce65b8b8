"""What one of two processes of tests/test_processes.py does: python process_main.py PORT ID TASK [ARGUMENT]."""

from __future__ import annotations

import os
import sys

import jax


def load(root: str) -> None:
    """Load a checkpoint, of which this process's copy is poisoned where the other's heads are, and run the layer."""
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType

    from mla_fp4_jax import MLAAttention, MLASharding, load_mla_layer

    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))
    layer = load_mla_layer(root, 0, dtype=jnp.float32, sharding=MLASharding(mesh, heads="heads"))
    x = np.random.default_rng(0).standard_normal((2, 5, layer.config.hidden_size)).astype(np.float32)
    cache = layer.init_cache(2, 8, page_size=16)
    y, cache = jax.jit(MLAAttention.prefill)(layer, x[:, :4], cache)
    z, cache = layer.decode(jnp.asarray(x[:, 4:]), cache)
    print(f"RESULT {float(jnp.abs(y).sum()):.6e} {float(jnp.abs(z).sum()):.6e}", flush=True)


def demo(victim: str) -> None:
    """The demo, in which process `victim` ends without a word at its third step."""
    import mla_fp4_jax.cli.decoding as decoding
    from mla_fp4_jax.cli import main

    port, process = sys.argv[1:3]
    whole, steps = decoding._whole, []

    def counted(layer, y):
        steps.append(1)
        if process == victim and len(steps) == 3:
            os._exit(9)
        return whole(layer, y)

    decoding._whole = counted
    where = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", process, "--timeout", "20"]
    sys.exit(main(["demo", *where, "--steps", "400"]))


if __name__ == "__main__":
    if sys.argv[3] == "load":
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]), initialization_timeout=60)
        load(sys.argv[4].replace("ID", sys.argv[2]))
    else:
        demo(sys.argv[4])
