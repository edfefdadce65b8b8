"""Bytes of a mapped file to arrays on devices: one copy, each device's own part only."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from mla_fp4_jax.fp4_array import FP4Array

logger = logging.getLogger(__name__)
FLOAT4 = jnp.float4_e2m1fn


class CodeBuffers:
    """float4_e2m1fn arrays from packed bytes. One object serves one load: it keeps an empty array per shape.

    On GPUs the bytes are put there and viewed, which is free. XLA's CPU back end views them nibble by nibble
    (0.09 GB/s with jax 0.10.2, seen on a 2-core Xeon): there an empty array is copied and the bytes are moved into
    the copy, which nobody else has seen yet. Its memory is the packed bytes; that is tried out before it is used.
    """

    def __init__(self) -> None:
        self._empty: dict[tuple, jax.Array] = {}
        self._lock = threading.Lock()  # lest two threads make the same one

    def make(self, packed: np.ndarray, device: Any | None = None) -> jax.Array:
        """Codes [..., C] from uint8 [..., C/2], copied to a jax.Device, or uncommitted to the default one."""
        if (device or default_device()).platform == "cpu":
            if packed.size and _cpu_memory_is_packed(device or default_device()):
                return self._filled(packed, device)
            packed = np.array(packed)  # device_put may make an array of the mapped file itself
        return _view_as_codes(jax.device_put(packed, device))

    def _filled(self, packed: np.ndarray, device: Any | None) -> jax.Array:
        shape = (*packed.shape[:-1], 2 * packed.shape[-1])
        key = (shape, device, default_device())
        with self._lock:
            if key not in self._empty:
                # Not jnp.zeros, which XLA's CPU back end fills nibble by nibble.
                self._empty[key] = jax.device_put(np.zeros(shape, FLOAT4), device)
        return _fill(self._empty[key], packed)


def _fill(template: jax.Array, packed: np.ndarray) -> jax.Array:
    # Committed or not as the template is. A jitted copy goes nibble by nibble in jax 0.10.
    fresh = jax.block_until_ready(jax.device_put(template, may_alias=False))
    pointer = fresh.unsafe_buffer_pointer()
    if pointer == template.unsafe_buffer_pointer():
        raise RuntimeError("a copy that is none")
    target = np.ctypeslib.as_array((ctypes.c_uint8 * packed.size).from_address(pointer))
    np.copyto(target.reshape(packed.shape), packed)
    return fresh


@functools.cache
def _cpu_memory_is_packed(device: Any) -> bool:
    packed = np.arange(256, dtype=np.uint8).reshape(4, 64)
    try:
        template = jax.device_put(np.zeros((4, 128), FLOAT4), device)
        filled = _fill(template, packed)
        works = bool(jnp.array_equal(_view_as_bytes(filled), packed)) and not bool(jnp.any(_view_as_bytes(template)))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        logger.info("packed codes are viewed by XLA, which is slow on a CPU: %s", error)
        return False
    return works


@jax.jit
def _view_as_codes(packed: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(packed, FLOAT4).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


@jax.jit
def _view_as_bytes(codes: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2), jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one weight goes, and in which shape.

    Attributes:
        shape: logical; a reshape of the stored one that leaves the last axis alone.
        sharding: None for JAX's default device.
        buffers: see there.
    """

    shape: tuple[int, ...]
    sharding: Sharding | None = None
    buffers: CodeBuffers = dataclasses.field(default_factory=CodeBuffers)

    def dense(self, view: np.ndarray, dtype: DTypeLike | None = None) -> jax.Array:
        """A plain array, put in its own dtype and cast on the device.

        On a CPU device_put may make an array of the very memory it is given, mapped file and may_alias=False
        notwithstanding (seen with jax 0.10 and 0.12): a weight that changed with the file, and a crash once that
        is cut short. There, and only there, the bytes are copied first.
        """
        array = self._put(view.reshape(self.shape))
        return array if dtype is None or array.dtype == jnp.dtype(dtype) else array.astype(dtype)

    def packed(
        self,
        packed: np.ndarray,
        scales: np.ndarray,
        format: str,
        *,
        global_scale: np.float32 | None = None,
        global_divisor: np.float32 | None = None,
    ) -> FP4Array:
        """An FP4Array from bytes [..., C/2] and scale bytes [..., C/G].

        Raises:
            ValueError: a sharding that does not divide the axes, or that cuts a group.
        """
        rows = self.shape[:-1]
        packed, scales = packed.reshape(*rows, -1), scales.view(np.uint8).reshape(*rows, -1)
        self._check_groups(scales.shape)
        if global_divisor is not None:
            global_scale = np.float32(1) / global_divisor
        return FP4Array(
            self._codes(packed),
            self._put(scales),
            None if global_scale is None else self._scalar(global_scale),
            format=format,
            global_divisor=None if global_divisor is None else self._scalar(global_divisor),
        )

    def local(self, view: np.ndarray) -> list[tuple[tuple[int, int], np.ndarray]]:
        """The parts [n, c] of a stored array [rows, columns] that this process's devices hold, and where each begins.

        The columns may be fewer than the weight's, as those of packed bytes and scales are. All of it in one part
        where this process has every device: nothing else is then read, and nothing twice.
        """
        if self.sharding is None or self.sharding.is_fully_addressable or view.ndim != 2:
            return [((0, 0), view)]
        shaped = view.reshape(*self.shape[:-1], view.shape[-1])
        found = {}
        for index in self.sharding.addressable_devices_indices_map(shaped.shape).values():
            assert index is not None
            starts = [part.start or 0 for part in index]
            row = int(np.ravel_multi_index(starts[:-1], shaped.shape[:-1]))
            found[row, starts[-1]] = shaped[index].reshape(-1, shaped[index].shape[-1])
        return list(found.items())

    def computed(self, compute: Callable[[slice, slice], np.ndarray]) -> jax.Array:
        """A plain matrix of which this process computes its devices' parts only, by rows and columns."""
        assert self.sharding is not None and len(self.shape) in (2, 3)

        def part(index: Any) -> np.ndarray:
            ends = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
            each = math.prod(
                self.shape[1:-1]
            )  # rows to one of the first axis, which alone of the leading ones is cut
            rows, columns = slice(ends[0][0] * each, ends[0][1] * each), slice(*ends[-1])
            return compute(rows, columns).reshape(*(last - first for first, last in ends))

        return jax.make_array_from_callback(self.shape, self.sharding, part)

    def _put(self, view: np.ndarray) -> jax.Array:
        sharding = self.sharding
        if sharding is None:  # uncommitted: free to follow what it is used with
            return jax.device_put(np.array(view) if default_device().platform == "cpu" else view)
        on_cpu = any(device.platform == "cpu" for device in sharding.device_set)
        return jax.make_array_from_callback(
            view.shape, sharding, lambda index: np.array(view[index]) if on_cpu else view[index]
        )

    def _codes(self, packed: np.ndarray) -> jax.Array:
        sharding = self.sharding
        if sharding is None:
            return self.buffers.make(packed)
        parts = [
            self.buffers.make(packed[index], device)
            for device, index in sharding.addressable_devices_indices_map(packed.shape).items()
        ]
        return jax.make_array_from_single_device_arrays(self.shape, sharding, parts)

    def _scalar(self, value: np.float32) -> jax.Array:
        if self.sharding is None:
            return jax.device_put(value)
        if isinstance(self.sharding, NamedSharding):
            everywhere = NamedSharding(self.sharding.mesh, PartitionSpec())
            return jax.make_array_from_callback((), everywhere, lambda index: np.asarray(value))
        return jax.device_put(value, next(iter(self.sharding.device_set)))

    def _check_groups(self, groups_shape: tuple[int, ...]) -> None:
        if self.sharding is None:
            return
        whole, groups = self.shape[-1], groups_shape[-1]
        try:
            part = self.sharding.shard_shape(self.shape)[-1]
            fits = groups == 0 or self.sharding.shard_shape(groups_shape)[-1] * (whole // groups) == part
        except ValueError as error:
            raise ValueError(
                f"load_mla_layers: sharding must divide a weight {self.shape} with scales {groups_shape}: {error}"
            ) from error
        if not fits:
            raise ValueError(
                f"load_mla_layers: sharding must not cut a scale group of a weight {self.shape}; it cuts "
                f"{whole} columns into parts of {part}, groups have {whole // groups}. Shard another axis."
            )


def default_device() -> Any:
    """Where JAX puts new arrays now, jax.default_device considered; within jax.set_mesh the mesh's first device."""
    return min(jnp.zeros((), jnp.uint8).devices(), key=lambda device: device.id)
