"""Merging the splits of a decoding attention, in Pallas Triton.

    lse = log sum_s exp(lse_s),   out = sum_s exp(lse_s - lse) out_s

over the splits that hold a key the sequence sees; the others were never written, and are not read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.backend import pl, pltriton

_FEW = 4
_ELEMENTS = 8192  # of the partial outputs that a program holds at once


def combine_splits(
    out: Float[Array, "splits B rows L"],
    lse: Float[Array, "splits B rows"],
    visible: Int32[Array, "B T"],
    length: Int32[Array, "B"],
    *,
    rows: int,
    split_size: int,
    out_dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[Float[Array, "B rows L"], Float[Array, "B rows"]]:
    """The merged output, and the natural-log LSE in float32.

    Args:
        out: each split's normalised output, float32; more rows than `rows` may be there.
        lse: each split's natural-log LSE, -inf for a row that sees nothing of it.
        visible: keys each new token sees.
        length: keys a sequence holds.
        rows: the rows to merge.
        split_size: keys a split.
        out_dtype: of the output.
        interpret: run in Pallas's interpreter.

    Rows that see nothing get exactly 0 and -inf.
    """
    splits, batch, _, width = out.shape
    padded = _next_power_of_2(splits)
    columns = min(width, max(32, _ELEMENTS // padded))
    return pl.pallas_call(
        functools.partial(_kernel, split_size=split_size, splits=splits, padded=padded, columns=columns),
        out_shape=[
            jax.ShapeDtypeStruct((batch, rows, width), out_dtype),
            jax.ShapeDtypeStruct((batch, rows), jnp.float32),
        ],
        grid=(rows, batch, width // columns),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="mla_decode_combine",
    )(out, lse, visible, length)


def _kernel(
    out_ref, lse_ref, visible_ref, length_ref, merged_ref, merged_lse_ref, *, split_size, splits, padded, columns
):
    row, b, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    tokens = visible_ref.shape[1]
    token = jnp.arange(_next_power_of_2(tokens), dtype=jnp.int32)
    visible = pltriton.load(visible_ref.at[b, token], mask=token < tokens, other=0)
    most = jnp.minimum(jnp.max(visible), length_ref[b])
    split = jnp.arange(padded, dtype=jnp.int32)
    written = (split < splits) & (split * np.int32(split_size) < most)
    lse = pltriton.load(lse_ref.at[split, b, row], mask=written, other=-jnp.inf)
    highest = jnp.max(lse)
    # A row that sees nothing has no maximum; any finite one keeps every weight at 0.
    weight = jnp.exp(lse - jnp.where(highest == -jnp.inf, 0.0, highest))
    total = jnp.sum(weight)
    nothing = total == 0
    column = part * np.int32(columns) + jnp.arange(columns, dtype=jnp.int32)
    # Few splits are loaded at once with all else and chosen from afterwards, which saves waiting for the lengths.
    asked = split < splits if splits <= _FEW else written
    every = column >= 0
    parts = pltriton.load(
        out_ref.at[split[:, None], b, row, column[None, :]], mask=asked[:, None] & every[None, :], other=0.0
    )
    parts = jnp.where(written[:, None], parts, 0.0)
    merged = jnp.sum(parts * weight[:, None], axis=0) / jnp.where(nothing, 1.0, total)
    pltriton.store(merged_ref.at[b, row, pl.ds(part * np.int32(columns), columns)], merged.astype(merged_ref.dtype))

    @pl.when(part == 0)
    def _():
        merged_lse_ref[b, row] = jnp.where(nothing, -jnp.inf, highest + jnp.log(jnp.where(nothing, 1.0, total)))


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
