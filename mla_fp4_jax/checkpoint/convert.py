"""Converting a checkpoint's attention to MXFP4, shard by shard, in little memory; every other byte stays."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mla_fp4_jax.checkpoint import quantization_out as out
from mla_fp4_jax.checkpoint.convert_state import ConvertState, alone_in
from mla_fp4_jax.checkpoint.converted import Converted
from mla_fp4_jax.checkpoint.dense import DTYPES as PLAIN_DTYPES
from mla_fp4_jax.checkpoint.directory import CONFIG_FILE, HF_QUANT_CONFIG_FILE, INDEX_SUFFIX, contained
from mla_fp4_jax.checkpoint.plan import LayerPlan, OpenCheckpoint, PlannedWeight, open_checkpoint, plan_layer
from mla_fp4_jax.checkpoint.quantization import find_quantization_config
from mla_fp4_jax.checkpoint.writer import CHUNK_BYTES, Streamed, write_json, write_streamed
from mla_fp4_jax.errors import CheckpointError
from mla_fp4_jax.quantize import LEAST_ERROR, MXFP4_GROUP, SCALE_RULES

REPORT_FILE = "mla_fp4_report.json"
REWRITTEN = (CONFIG_FILE, HF_QUANT_CONFIG_FILE, REPORT_FILE)
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
UNQUANTISED = (*PLAIN_DTYPES, "F64", "I64", "BOOL")
RULES = (*SCALE_RULES, LEAST_ERROR)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What will be done, decided from headers.

    Attributes:
        opened: the source.
        plans: its attention layers.
        method: whose names and config are written: QUARK or COMPRESSED_TENSORS.
        scale_rule: of quantize_mxfp4.
        jobs: module -> a weight to convert, or to put from GGUF's nibble order into the usual one.
        kept: module -> why a weight that was asked for stays as it is.
    """

    opened: OpenCheckpoint
    plans: tuple[LayerPlan, ...]
    method: str
    scale_rule: str
    jobs: dict[str, PlannedWeight]
    kept: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        checkpoint = self.opened.checkpoint
        return sum(entry.nbytes for name in checkpoint.file_names for entry in checkpoint.open(name).entries.values())


def plan_conversion(
    source: str | os.PathLike[str],
    *,
    kv_b: str = "mxfp4",
    linears: str = "keep",
    scale_rule: str = "even",
    config: str | None = None,
    nibble_order: str = "linear",
) -> Conversion:
    """Decide what to convert; reads headers only. Arguments as convert_checkpoint's."""
    for name, value, allowed in (
        ("kv_b", kv_b, ("mxfp4", "keep")),
        ("linears", linears, ("mxfp4", "keep")),
        ("scale_rule", scale_rule, RULES),
        ("config", config, (None, *out.METHODS)),
    ):
        if value not in allowed:
            raise ValueError(f"convert_checkpoint: {name} must be one of {allowed}; got {value!r}. Choose one.")
    opened = open_checkpoint(source, nibble_order)
    for name in opened.checkpoint.file_names:  # so that a tensor in two of them is found
        opened.checkpoint.open(name)
    plans = tuple(plan_layer(opened, layer) for layer in opened.names.layers)
    if not plans:
        raise CheckpointError(f"{opened.checkpoint.root}: has no attention layer to convert.")
    found = find_quantization_config(opened.checkpoint.config) or {}
    inherited = found["quant_method"] if found.get("quant_method") in out.METHODS else out.QUARK
    jobs, kept = {}, {}
    for plan in plans:
        for planned in plan.weights:
            asked = kv_b if planned.field == "kv_b_proj" else linears
            if opened.gguf_nibbles and planned.reader.packed:
                jobs[planned.stored.name] = planned  # no file could say that its order is GGUF's
                continue
            if asked == "keep" or len(planned.stored.shape) != 2:
                continue
            why = _why_kept(planned)
            if why is None:
                jobs[planned.stored.name] = planned
            else:
                kept[planned.stored.name] = why
    return Conversion(opened, plans, config or inherited, scale_rule, jobs, kept)


def _why_kept(planned: PlannedWeight) -> str | None:
    if planned.reader.packed:
        return f"is {planned.reader.name} already"
    columns = planned.stored.shape[1]
    return f"groups of {MXFP4_GROUP} do not divide its {columns} columns" if columns % MXFP4_GROUP else None


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    kv_b: str = "mxfp4",
    linears: str = "keep",
    scale_rule: str = "even",
    config: str | None = None,
    nibble_order: str = "linear",
    progress: Callable[[int], object] = lambda nbytes: None,
) -> dict[str, Any]:
    """Write a checkpoint whose attention projections are MXFP4; all other tensors keep their bytes.

    Shards keep their names; each is written whole or not at all, config.json and the index last, so that what is
    there loads only once it is complete. Interrupted, it goes on where it stopped. Weights are read a few rows at a
    time. A weight that is FP4 already passes through, byte for byte.

    Args:
        source: a checkpoint; see load_mla_layer.
        target: a directory, new, empty or of the same conversion interrupted.
        kv_b: "mxfp4" or "keep".
        linears: likewise of attention's other projections.
        scale_rule: of quantize_mxfp4.
        config: whose tensor names and quantization_config to write, "quark" or "compressed-tensors"; None for the
            source's where it has one of these, else "quark".
        nibble_order: of the source's packed codes, as for load_mla_layer. Attention's are written in the usual order.
        progress: told the bytes read.

    Returns:
        The report: {"converted": {module: {"relative_rms_error", "max_error", "from", "bytes_before",
        "bytes_after"}}, "kept": {module: why}, "notes": [...], ...}. It is also written to mla_fp4_report.json.

    Raises:
        CheckpointError: a source that does not load, a target that holds something else.
        ValueError: an unknown option.
    """
    options = {"kv_b": kv_b, "linears": linears, "scale_rule": scale_rule, "nibble_order": nibble_order}
    conversion = plan_conversion(source, config=config, **options)
    options["config"] = conversion.method
    with alone_in(Path(target)):
        return _write(conversion, Path(target), options, progress)


def _write(
    conversion: Conversion, directory: Path, options: dict[str, Any], progress: Callable[[int], object]
) -> dict[str, Any]:
    """All files of the target, config.json last; the report."""
    checkpoint = conversion.opened.checkpoint
    state = ConvertState.open(checkpoint, directory, options)
    left = _copy_other_files(checkpoint.root, directory, set(checkpoint.file_names))
    weight_map: dict[str, str] = {}
    for file_name in checkpoint.file_names:
        if state.is_done(file_name):
            progress(sum(entry.nbytes for entry in checkpoint.open(file_name).entries.values()))
        else:
            errors: dict[str, dict[str, Any]] = {}
            tensors = list(_shard(conversion, file_name, errors, progress))
            write_streamed(directory / file_name, tensors, _metadata(conversion, file_name))
            checkpoint.check_unchanged()
            state.done(file_name, [t.name for t in tensors], sum(t.nbytes for t in tensors), errors)
        # A tensor may be in two shards; the source's index says which holds.
        weight_map |= {
            name: file_name
            for name in state.tensors(file_name)
            if name.rpartition(".")[0] in conversion.jobs
            or (name in checkpoint.names and checkpoint.file_of(name).name == file_name)
        }

    others = _other_modules(conversion)
    hf_quant_config = checkpoint.hf_quant_config
    if hf_quant_config is not None and conversion.jobs:
        hf_quant_config = out.excluding(hf_quant_config, conversion.jobs, others) if any(others.values()) else None
    values, remark = out.converted_config(
        checkpoint.config,
        conversion.method,
        options["scale_rule"],
        list(conversion.jobs),
        list(others),
        others_quantised=any(others.values()),
        elsewhere=hf_quant_config is not None,
    )
    if checkpoint.index_name is not None:
        metadata = {"total_size": state.total_size}
        write_json(directory / checkpoint.index_name, {"metadata": metadata, "weight_map": weight_map})
    report = {
        "source": str(checkpoint.root),
        **options,
        "converted": state.errors,
        "kept": conversion.kept,
        "notes": ([] if remark is None else [remark]) + ([f"not copied: {', '.join(left)}"] if left else []),
    }
    write_json(directory / REPORT_FILE, report)
    if hf_quant_config is not None:
        write_json(directory / HF_QUANT_CONFIG_FILE, hf_quant_config)
    write_json(directory / CONFIG_FILE, values)
    state.finish()
    return report


def _shard(
    conversion: Conversion, file_name: str, errors: dict[str, dict[str, Any]], progress: Callable[[int], object]
) -> Iterator[Streamed]:
    file = conversion.opened.checkpoint.open(file_name)
    owner = {
        entry.name: (module, suffix)
        for module, planned in conversion.jobs.items()
        for suffix, entry in planned.stored.tensors.items()
    }
    for name, entry in file.entries.items():
        module, suffix = owner.get(name, (None, None))
        if module is None:
            yield Streamed(name, entry.dtype, entry.shape, lambda n=name: _copied(file, n, progress))
        elif suffix in ("weight", "weight_packed"):
            planned = conversion.jobs[module]
            converted = Converted(planned, conversion.scale_rule, errors, progress)
            codes, scale = out.SUFFIXES[conversion.method]
            rows, columns = planned.stored.shape
            yield Streamed(f"{module}.{codes}", "U8", (rows, columns // 2), converted.codes)
            yield Streamed(f"{module}.{scale}", "U8", (rows, columns // MXFP4_GROUP), converted.scales)
        # The scales that were there are used up.


def _copied(file, name: str, progress: Callable[[int], object]) -> Iterator[bytes]:
    for chunk in file.chunks(name, CHUNK_BYTES):
        progress(len(chunk))
        yield chunk


def _metadata(conversion: Conversion, file_name: str) -> dict[str, str] | None:
    metadata = conversion.opened.checkpoint.open(file_name).metadata
    return dict(metadata) if metadata else {"format": "pt"}


def _other_modules(conversion: Conversion) -> dict[str, bool]:
    """Modules with a matrix that were not converted, what a config has to exclude; and whether they are quantised."""
    checkpoint = conversion.opened.checkpoint
    found: dict[str, bool] = {}
    for file_name in checkpoint.file_names:
        for name, entry in checkpoint.open(file_name).entries.items():
            module, _, suffix = name.rpartition(".")
            if module in conversion.jobs or len(entry.shape) < 2:
                continue
            quantised = entry.dtype not in UNQUANTISED
            if suffix == "weight" or quantised:
                found[module] = found.get(module, False) or quantised
    return found


def _copy_other_files(source: Path, target: Path, shards: set[str]) -> list[str]:
    """Copy tokenizers and the like; returns what is left behind: directories, and weights that are no shards."""
    left = []
    for path in sorted(source.iterdir()):
        name = path.name
        if name in {*shards, *REWRITTEN} or name.startswith(".") or name.endswith(INDEX_SUFFIX):
            continue
        if path.suffix in WEIGHT_FILES or name.endswith(".bin.index.json") or not path.is_file():
            left.append(name)
            continue
        temporary = target / f".{name}.tmp"
        shutil.copyfile(contained(source, name), temporary)
        os.replace(temporary, target / name)
    return left
