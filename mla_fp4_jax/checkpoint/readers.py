"""Which formats are read, and what to say of one that is not."""

from __future__ import annotations

from mla_fp4_jax.checkpoint import dense, quark
from mla_fp4_jax.checkpoint.stored import Reader, StoredWeight
from mla_fp4_jax.errors import CheckpointError

READERS: tuple[Reader, ...] = (dense.READER, quark.READER)

# Formats known by their tensors but not read: suffix -> dtypes that must be there, and what that is.
_UNREAD: tuple[tuple[dict[str, tuple[str, ...]], str], ...] = (
    ({"weight": ("F8_E4M3",), "weight_scale_inv": ("F32", "BF16", "F8_E8M0")}, "DeepSeek's block-scaled FP8"),
    ({"weight": ("F8_E4M3", "F8_E5M2"), "weight_scale": ("F32", "BF16", "F16")}, "FP8 with coarse scales"),
    ({"weight": ("F8_E4M3", "F8_E5M2")}, "FP8 without its scales"),
    ({"weight": ("U8",), "weight_scale": ("F8_E4M3",)}, "NVFP4 (ModelOpt or Quark)"),
    ({"weight_packed": ("U8",), "weight_scale": ("F8_E4M3",)}, "NVFP4 (compressed-tensors)"),
    ({"weight_packed": ("U8",), "weight_scale": ("U8",)}, "MXFP4 (compressed-tensors or AutoRound)"),
    ({"_weight_qdata": ("U8",)}, "MXFP4 or NVFP4 (torchao, swizzled scales)"),
    ({"weight_packed": ("I32",)}, "INT4 (compressed-tensors)"),
    ({"qweight": ("I32",)}, "INT4 (GPTQ or AWQ)"),
    ({"weight": ("U8",)}, "packed codes without scales that fit them"),
)


def find_reader(stored: StoredWeight) -> Reader:
    """The reader of a weight's format, decided by its tensors alone and never by what a config claims.

    Raises:
        CheckpointError: no reader knows these tensors.
    """
    for reader in READERS:
        if reader.recognises(stored):
            return reader
    listing = ", ".join(f"{suffix} {entry}" for suffix, entry in sorted(stored.tensors.items()))
    first = next(iter(stored.tensors.values()))
    known = " and ".join(reader.name for reader in READERS)
    raise CheckpointError(
        f"{stored.source.file_of(first.name)}: the tensors of {stored.name} ({listing}) look like "
        f"{_looks_like(stored)}, which is not read; {known} weights are."
    )


def _looks_like(stored: StoredWeight) -> str:
    for signature, kind in _UNREAD:
        if all(s in stored.tensors and stored.tensors[s].dtype in dtypes for s, dtypes in signature.items()):
            return kind
    return "no known format"
