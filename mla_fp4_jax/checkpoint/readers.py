"""Which formats are read, and what to say of one that is not."""

from __future__ import annotations

from mla_fp4_jax.checkpoint import dense, fp8, gguf, mxfp4, nvfp4, torchao
from mla_fp4_jax.checkpoint.stored import Reader, StoredWeight
from mla_fp4_jax.checkpoint.strict_json import quoted
from mla_fp4_jax.errors import CheckpointError

READERS: tuple[Reader, ...] = (
    dense.READER,
    mxfp4.READER,
    *nvfp4.READERS,
    fp8.READER,
    *torchao.READERS,
    gguf.READER,
)

# Formats known by their tensors but not read: suffix -> dtypes that must be there, and what that is.
_UNREAD: tuple[tuple[dict[str, tuple[str, ...]], str], ...] = (
    (
        {"pre_quant_scale": ("BF16", "F16", "F32")},
        "a weight smoothed by ModelOpt's AWQ, whose pre_quant_scale is lost",
    ),
    ({"weight_scale": ("F8_E4M3",), "weight": ("U8",)}, "NVFP4 without its weight_scale_2"),
    ({"weight_scale": ("F8_E4M3",), "weight_packed": ("U8",)}, "NVFP4 without its weight_global_scale"),
    ({"weight": ("F8_E4M3", "F8_E5M2")}, "FP8 without its scales"),
    ({"weight.absmax": ("F32", "U8")}, "bitsandbytes' 4-bit floats"),
    ({"SCB": ("F32",)}, "INT8 (bitsandbytes)"),
    ({"W_q": ("U8", "I32")}, "HQQ's integers"),
    ({"weight": ("I8",), "weight_scale": ("F32", "BF16", "F16")}, "INT8"),
    ({"weight_packed": ("I32",)}, "INT4 (compressed-tensors)"),
    ({"qweight": ("I32",)}, "INT4 (GPTQ or AWQ)"),
    ({"weight": ("U32",), "scales": ("U8",)}, "MLX's MXFP4"),
    ({"weight": ("U32",)}, "MLX's integers"),
    ({"_weight_qdata": ("F8_E4M3",)}, "torchao's FP8"),
    ({"weight": ("U8",)}, "packed codes without scales that fit them"),
    ({"weight_packed": ("U8",)}, "packed codes without scales that fit them"),
)


def find_reader(stored: StoredWeight) -> Reader:
    """The reader of a weight's format, decided by its tensors alone.

    Raises:
        CheckpointError: no reader knows these tensors, or the config calls them another packed format than they are.
    """
    for reader in READERS:
        if reader.recognises(stored):
            check_declared(stored, reader)
            if stored.gguf_nibbles and reader.packed and reader.packed_rows is None:
                raise stored.error(
                    next(iter(stored.tensors)), f"is {reader.name}, which GGUF's nibble order is not for."
                )
            return reader
    listing = ", ".join(f"{suffix} {entry}" for suffix, entry in sorted(stored.tensors.items()))
    first = next(iter(stored.tensors.values()))
    raise CheckpointError(
        f"{stored.source.file_of(first.name)}: the tensors of {stored.name} ({listing}) look like "
        f"{_looks_like(stored)}, which is not read; {', '.join(known_formats())} weights are."
    )


def known_formats() -> list[str]:
    """Names of the formats that are read."""
    return list(dict.fromkeys(reader.name for reader in READERS))


def check_declared(stored: StoredWeight, reader: Reader) -> None:
    """Raise CheckpointError where the config contradicts the tensors in what their values mean.

    A config that calls a dense weight quantised, or a quantised one excluded, is merely out of date: the tensors
    leave no doubt. One that calls packed bytes another packed format may know something that they do not show.
    """
    said = stored.declared.format
    if said in (None, "dense", reader.format) or reader.format == "dense":
        return
    suffix = next(iter(stored.tensors))
    raise stored.error(
        suffix,
        f"is {reader.name} by its tensors, but quantization_config calls it {quoted(said)}. One of them is wrong.",
    )


def _looks_like(stored: StoredWeight) -> str:
    for signature, kind in _UNREAD:
        if all(s in stored.tensors and stored.tensors[s].dtype in dtypes for s, dtypes in signature.items()):
            return kind
    return "no known format"
