"""What a decode step of attention layers must move, compute and exchange on a device, and the least time for it."""

from __future__ import annotations

import dataclasses

from mla_fp4_jax import MLAConfig

DEEPSEEK_V3 = MLAConfig(
    hidden_size=7168,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
KIMI_K2 = dataclasses.replace(DEEPSEEK_V3, num_attention_heads=64)
MODELS = {"DeepSeek-V3/R1": DEEPSEEK_V3, "Kimi-K2": KIMI_K2}
LAYERS = 61  # of both
HOST = 8  # GPUs that NVLink joins
ENTRY_BYTES = 2  # bfloat16 caches, activations and all-reduces
WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0 + 4 / 128**2, "fp4": 0.5 + 1 / 32}  # an element, its scales included


@dataclasses.dataclass(frozen=True)
class Gpu:
    """From NVIDIA's datasheets: bytes/s of memory, dense bfloat16 FLOP/s, bytes, NVLink bytes/s one way."""

    name: str
    memory_rate: float
    flops: float
    memory: float
    link_rate: float


GPUS = {
    "H100": Gpu("H100", 3.35e12, 989e12, 80e9, 450e9),
    "H200": Gpu("H200", 4.8e12, 989e12, 141e9, 450e9),
}


def find_gpu(kind: str) -> Gpu | None:
    """By a device's kind, such as "NVIDIA H100 80GB HBM3"."""
    return next((gpu for name, gpu in GPUS.items() if name in kind), None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many parts heads, sequences and contexts are split into."""

    heads: int = 1
    batch: int = 1
    context: int = 1

    @property
    def devices(self) -> int:
        return self.heads * self.batch * self.context

    def __str__(self) -> str:
        return f"TP{self.heads} DP{self.batch} CP{self.context}"


def layouts(gpus: int, c: MLAConfig) -> list[Layout]:
    """All with groups within a host."""
    powers = (1, 2, 4, 8)
    return [
        Layout(heads, gpus // (heads * context), context)
        for heads in powers
        for context in powers
        if heads * context <= HOST and gpus % (heads * context) == 0 and c.num_attention_heads % heads == 0
    ]


@dataclasses.dataclass(frozen=True)
class Share:
    """One layer's decode step on one device.

    Attributes:
        weights: elements held, and read once.
        cache_bytes: read.
        projection_flops, attention_flops: two a multiplication.
        exchanged: bytes of the all-reduce's operand.
        group: devices that take part in it.
    """

    weights: dict[str, int]
    cache_bytes: int
    projection_flops: float
    attention_flops: float
    exchanged: int
    group: int

    def weight_bytes(self, formats: dict[str, str], default: str = "bf16") -> float:
        """Bytes of the weights, each in its format of WEIGHT_BYTES."""
        return sum(n * WEIGHT_BYTES[formats.get(name, default)] for name, n in self.weights.items())

    def projections_s(self, gpu: Gpu, formats: dict[str, str], default: str = "bf16") -> float:
        """The least seconds for the linear maps."""
        return max(self.weight_bytes(formats, default) / gpu.memory_rate, self.projection_flops / gpu.flops)

    def attention_s(self, gpu: Gpu) -> float:
        """The least seconds for attention over the cache."""
        return max(self.cache_bytes / gpu.memory_rate, self.attention_flops / gpu.flops)


def share(c: MLAConfig, layout: Layout, sequences: int, keys: int) -> Share:
    """A device's share of one layer's step for `sequences` in all, with `keys` cached tokens each."""
    heads, rows, slots = c.num_attention_heads / layout.heads, sequences / layout.batch, keys / layout.context
    assert c.q_lora_rank is not None
    weights = {
        "q_a_proj": c.q_lora_rank * c.hidden_size,
        "q_b_proj": int(heads * c.qk_head_dim) * c.q_lora_rank,
        "kv_a_proj_with_mqa": c.cache_dim * c.hidden_size,
        "kv_b_proj": int(heads * (c.qk_nope_head_dim + c.v_head_dim)) * c.kv_lora_rank,
        "o_proj": c.hidden_size * int(heads * c.v_head_dim),
    }
    return Share(
        weights,
        int(rows * slots * c.cache_dim * ENTRY_BYTES),
        2.0 * rows * sum(weights.values()),
        2.0 * rows * heads * slots * (2 * c.kv_lora_rank + c.qk_rope_head_dim),
        int(rows * c.hidden_size * ENTRY_BYTES),
        layout.heads * layout.context,
    )
