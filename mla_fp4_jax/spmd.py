"""Running a step on every device of a mesh: the shard_map that a user's plain jit would otherwise lack.

A kernel is opaque to XLA's partitioner, which gathers its sharded operands. Here each device's part is traced as what
it is, a step of a layer with fewer heads, sequences and slots, so nothing is gathered.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mla_fp4_jax.cache import Cache, cache_specs
from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.shard import Shard
from mla_fp4_jax.sharding import LOGICAL, MLASharding
from mla_fp4_jax.weights import MLAWeights
from pallas_kernels.fragments import BLOCK

Step = Callable[..., tuple[jax.Array, Cache]]


def weight_specs(weights: MLAWeights, sharding: MLASharding) -> MLAWeights:
    """The weights with each array's PartitionSpec in its place."""

    def specs(field: str) -> Any:
        value, spec = getattr(weights, field), sharding.weight_spec(field)
        if not isinstance(value, FP4Array):
            return None if value is None else spec
        scalars = {name: None if getattr(value, name) is None else P() for name in ("global_scale", "global_divisor")}
        return dataclasses.replace(value, codes=spec, scales=spec, **scalars)

    return MLAWeights(**{field.name: specs(field.name) for field in dataclasses.fields(MLAWeights)})


def group_sizes(weights: MLAWeights) -> dict[str, int]:
    """G of the weights that are packed, by name."""
    values = {field.name: getattr(weights, field.name) for field in dataclasses.fields(MLAWeights)}
    return {name: value.group_size for name, value in values.items() if isinstance(value, FP4Array)}


def place_weights(weights: MLAWeights, sharding: MLASharding) -> MLAWeights:
    """Each weight on its devices; those that are there already stay, as do tracers.

    Raises:
        ValueError: heads that do not divide, or that would cut a group; see MLASharding.check.
    """
    fields = [field.name for field in dataclasses.fields(MLAWeights)]
    weights = MLAWeights(**{name: _divisible(getattr(weights, name), name, sharding) for name in fields})
    specs = weight_specs(weights, sharding)
    return jax.tree.map(lambda leaf, spec: _place(leaf, NamedSharding(sharding.mesh, spec)), weights, specs)


def on_every_device(
    step: Step,
    sharding: MLASharding,
    weights: MLAWeights,
    x: jax.Array,
    cache: Cache,
    config: MLAConfig,
    positions: jax.Array | None,
    active: jax.Array,
    **static: Any,
) -> tuple[jax.Array, Cache]:
    """step(shard, weights, x, cache, config, positions, active, **static) on each device's part.

    Inside a shard_map over all the axes that `sharding` names, the arguments are taken for one device's parts and the
    step runs on them as they are; over some of them, the rest is split here.

    Args:
        step: a module's function; every argument is local: config has a device's heads.
        sharding: the axes.
        weights, x, cache, config, positions, active: of the whole layer, which were checked.
        static: hashable.

    Raises:
        ValueError: sizes that do not divide; a mesh in use (jax.set_mesh) that is another; with Explicit axes,
            weights or a cache that lie otherwise than `sharding` says, which every step would move.
    """
    context = jax.sharding.get_abstract_mesh()
    if not context.empty and any(context.shape.get(n) != size for n, size in sharding.mesh.shape.items()):
        raise ValueError(
            f"MLASharding: mesh must be the one in use, {dict(context.shape)}; got {dict(sharding.mesh.shape)}. Make "
            "the sharding with that mesh."
        )
    statics = {"step": step, "sharding": sharding, "config": config, "static": tuple(static.items())}
    return _run(weights, cache, (x, positions, active), **statics)


@functools.partial(jax.jit, static_argnames=("step", "sharding", "config", "static"))
def _run(weights, cache, tokens, *, step: Step, sharding: MLASharding, config: MLAConfig, static: tuple):
    sharding.check(config, group_sizes(weights))
    heads = config.num_attention_heads // sharding.size("heads")
    local_config = dataclasses.replace(config, num_attention_heads=heads)
    shard = Shard(
        *(tuple(n for n in sharding.names(of) if sharding.mesh.shape[n] > 1) for of in ("heads", "context"))
    )

    def local(weights, cache, tokens):
        x, positions, active = tokens
        weights = jax.tree.map(_own_part, weights, is_leaf=lambda value: isinstance(value, FP4Array))
        return step(shard, weights, x, cache, local_config, positions, active, **dict(static))

    context = jax.sharding.get_abstract_mesh()
    manual = set(context.manual_axes)
    ours = {name for logical in LOGICAL for name in sharding.names(logical)}
    if manual and ours <= manual:
        return local(weights, cache, tokens)
    if not manual:
        sharding.check_batch(tokens[0].shape[0])
        sharding.check_capacity(cache.capacity)
    every = (
        weight_specs(weights, sharding),
        cache_specs(cache, sharding),
        tuple(None if token is None else sharding.tokens_spec for token in tokens),
    )
    specs = jax.tree.map(lambda spec: _without(spec, manual), every)
    given = jax.tree.map(functools.partial(_typed, sharding, manual), (weights, cache, tokens), specs)
    return jax.shard_map(
        local,
        mesh=sharding.mesh if context.empty else None,
        in_specs=specs,
        out_specs=(specs[2][0], specs[1]),
        axis_names=set(sharding.mesh.axis_names) - manual,
        check_vma=False,  # Pallas's kernels do not say what varies over which axis
    )(*given)


def _without(spec: P, manual: set[str]) -> P:
    """A spec less the axes that are split already."""

    def keep(entry):
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        kept = tuple(name for name in names if name not in manual)
        return kept[0] if len(kept) == 1 else kept or None

    return P(*map(keep, spec)) if manual else spec


def _typed(sharding: MLASharding, manual: set[str], leaf: jax.Array, spec: P) -> jax.Array:
    """With Explicit axes shard_map takes only the types it asks for; replicated ones and tokens get them."""
    mesh = sharding.mesh
    explicit = {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    explicit -= manual
    if not explicit:
        return leaf
    wanted, found = _without(spec, set(mesh.axis_names) - explicit), jax.typeof(leaf).sharding.spec
    if any(found) and spec != sharding.tokens_spec and _full(found, leaf) != _full(wanted, leaf):
        raise ValueError(
            f"MLASharding: weights and cache must lie as it says, {wanted} for {leaf.dtype}{leaf.shape}; got "
            f"{found}. Place them once: MLAAttention, load_mla_layer and init_cache do, given the sharding."
        )
    return jax.sharding.reshard(leaf, NamedSharding(mesh, wanted))


def _full(spec: P, leaf: jax.Array) -> list[tuple[str, ...]]:
    """The spec's axes for each of an array's."""
    entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return entries + [()] * (leaf.ndim - len(entries))


def _divisible(value: Any, field: str, sharding: MLASharding) -> Any:
    """A packed weight in an order whose bytes can be split as the sharding says; else in the checkpoint's."""
    if not isinstance(value, FP4Array) or value.order is None or value.ndim == 3:  # heads have an order each
        return value
    parts = sharding.size("heads")
    column_parts = parts if field == "o_proj" else 1
    by_rows = field == "o_proj" or sharding.weight_spec(field) == P() or value.shape[0] // parts % BLOCK == 0
    return value if value.order.column_parts == column_parts and by_rows else value.in_checkpoint_order()


def _own_part(value: Any) -> Any:
    """Of an order that has a part for each device, this device's."""
    if not isinstance(value, FP4Array) or value.order is None:
        return value
    return dataclasses.replace(value, order=dataclasses.replace(value.order, column_parts=1))


def _place(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.device_put(leaf, sharding) if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) else leaf
