"""Which mesh axis splits what: the rules by which one layer, its weights and its cache lie on many devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mla_fp4_jax.config import MLAConfig

AxisNames = str | tuple[str, ...] | None
# Weights with a head's numbers along one axis, and which. All others are on every device.
_HEADS_ALONG = {"q_proj": 0, "q_b_proj": 0, "kv_b_proj": 0, "o_proj": 1}
LOGICAL = ("heads", "batch", "context")


@dataclasses.dataclass(frozen=True)
class MLASharding:
    """Logical axes to mesh axes. MLAAttention, load_mla_layer, load_mla_layers and init_cache take one.

        heads    tensor parallel: q_b_proj (or q_proj) and kv_b_proj hold a device's heads, o_proj their columns; one
                 all-reduce follows o_proj. q_a_proj, kv_a_proj_with_mqa, norms, biases and the cache are not split.
        batch    data parallel: x and the cache hold a device's sequences; nothing is communicated.
        context  context parallel, for long sequences: device c of C holds the cache's slots c, c + C, c + 2C, ...,
                 so that the work is even at every length. Each attends to its own; what they share is one float32 a
                 head and token (the LSEs), and the all-reduce after o_proj, which then sums over context too.

    Attributes:
        mesh: of devices, its axes Auto or Explicit.
        heads, batch, context: names of mesh axes, several or None (not split). A mesh axis that is not named has
            the same on all its devices.

    Raises:
        ValueError: a name that the mesh lacks, or that is given twice.
    """

    mesh: Mesh | AbstractMesh
    heads: AxisNames = None
    batch: AxisNames = None
    context: AxisNames = None

    def __post_init__(self) -> None:
        used: set[str] = set()
        for logical in LOGICAL:
            for name in self.names(logical):
                if name not in self.mesh.axis_names:
                    raise ValueError(
                        f"MLASharding: {logical} must name axes of the mesh; got {name!r}, the mesh has "
                        f"{self.mesh.axis_names}. Make it with jax.make_mesh(sizes, names)."
                    )
                if name in used:
                    raise ValueError(
                        f"MLASharding: {logical} must have mesh axes of its own; got {name!r} twice. Use two axes."
                    )
                used.add(name)

    def names(self, logical: str) -> tuple[str, ...]:
        """The mesh axes of "heads", "batch" or "context", as a tuple."""
        axes = getattr(self, logical)
        return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)

    def size(self, logical: str) -> int:
        """Into how many parts "heads", "batch" or "context" is split."""
        return math.prod(self.mesh.shape[name] for name in self.names(logical))

    def weight_spec(self, field: str) -> P:
        """Of a weight by its name in MLAWeights; an FP4Array's codes and scales both have it."""
        if field not in _HEADS_ALONG:
            return P()
        return P(*[None] * _HEADS_ALONG[field], self.heads)

    def weight(self, field: str, shape: tuple[int, ...] = ()) -> NamedSharding:
        """Where a weight goes: what load_mla_layer's `sharding` may be a function for."""
        del shape
        return NamedSharding(self.mesh, self.weight_spec(field))

    @property
    def tokens_spec(self) -> P:
        """Of what has sequences first: x, y, positions, lengths, masks."""
        return P(self.batch)

    @property
    def entries_spec(self) -> P:
        """Of a contiguous cache's entries [B, S, L+R] and of a page table [B, M]."""
        return P(self.batch, self.context)

    @property
    def pages_spec(self) -> P:
        """Of pages [N, page_size, L+R]: each device has its own."""
        return P((*self.names("batch"), *self.names("context")) or None)

    def check(self, config: MLAConfig, group_sizes: Mapping[str, int] | None = None) -> None:
        """Raise ValueError where heads cannot be split, or where splitting them would cut a scale group or a byte.

        Args:
            config: the layer's sizes.
            group_sizes: G of the weights that are packed, by name. Only o_proj's groups lie along the heads.
        """
        heads, group = config.num_attention_heads, (group_sizes or {}).get("o_proj", 1)
        whole_groups = [
            n for n in range(1, heads + 1) if heads % n == 0 and heads // n * config.v_head_dim % group == 0
        ]
        parts = self.size("heads")
        if parts in whole_groups:
            return
        if heads % parts:
            rule = f"divide num_attention_heads = {heads}"
        else:
            rule = (
                f"leave o_proj's scale groups of {group} whole ({heads // parts} heads of {config.v_head_dim} do not)"
            )
        raise ValueError(
            f"MLASharding: the mesh axis of heads must {rule}; got size {parts}. Legal sizes: "
            f"{whole_groups or 'none'}."
        )

    def check_batch(self, batch_size: int) -> None:
        """Raise ValueError unless sequences divide evenly."""
        self._check_even("batch", "B, the number of sequences,", batch_size)

    def check_capacity(self, slots: int, what: str = "S, the cache's capacity,") -> None:
        """Raise ValueError unless a cache divides evenly along its slots."""
        self._check_even("context", what, slots)

    def _check_even(self, logical: str, what: str, value: int) -> None:
        parts = self.size(logical)
        if value % parts:
            legal = [n for n in range(1, value + 1) if value % n == 0]
            raise ValueError(
                f"MLASharding: {what} must be a multiple of the {parts} devices along {logical}; got {value}. Pad it "
                f"to {-(-value // parts) * parts}, or use one of {legal} devices."
            )
