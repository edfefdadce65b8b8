"""One weight on its way to MXFP4: read, quantised or put in order, a few rows at a time, and what that loses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_fp4_jax.checkpoint.mxfp4 import decode_mxfp4
from mla_fp4_jax.checkpoint.plan import PlannedWeight
from mla_fp4_jax.quantize import quantize_mxfp4

CHUNK_ELEMENTS = 1 << 22


class Converted:
    """A weight's MXFP4 bytes: the codes as they are made, the scales (1/64 of a bf16 weight) once that is over."""

    def __init__(
        self,
        planned: PlannedWeight,
        scale_rule: str,
        errors: dict[str, dict[str, Any]],
        progress: Callable[[int], object],
    ):
        """Nothing is read yet. `errors` gets the weight's entry once its codes are made."""
        self._planned, self._rule, self._errors, self._progress = planned, scale_rule, errors, progress
        self._scales: list[np.ndarray] = []

    def codes(self) -> Iterator[np.ndarray]:
        """Packed codes, some rows at a time."""
        planned = self._planned
        rows, columns = planned.stored.shape
        step = max(1, CHUNK_ELEMENTS // columns)
        lost, total, worst = 0.0, 0.0, 0.0
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            if planned.reader.packed_rows is not None:
                packed, scales = planned.reader.packed_rows(planned.stored, part)
            else:
                values = planned.reader.rows(planned.stored, part)
                packed, scales = (np.asarray(made) for made in _quantize(jnp.asarray(values), self._rule))
                difference = decode_mxfp4(packed, scales).astype(np.float64) - values
                lost += float(np.sum(difference**2))
                total += float(np.sum(values.astype(np.float64) ** 2))
                worst = max(worst, float(np.max(np.abs(difference), initial=0.0)))
            self._scales.append(scales)
            self._progress(planned.nbytes * len(packed) // rows)
            yield packed
        self._errors[planned.stored.name] = {
            "relative_rms_error": (lost / total) ** 0.5 if total else 0.0,
            "max_error": worst,
            "from": planned.format,
            "bytes_before": planned.nbytes,
            "bytes_after": rows * columns * 17 // 32,
        }

    def scales(self) -> Iterator[np.ndarray]:
        """Scale bytes, of codes that have been made."""
        yield from self._scales


@functools.partial(jax.jit, static_argnums=1)
def _quantize(values: jax.Array, scale_rule: str) -> tuple[jax.Array, ...]:
    return quantize_mxfp4(values, scale_rule=scale_rule).to_packed()
