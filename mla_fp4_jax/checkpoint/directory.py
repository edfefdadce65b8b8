"""A checkpoint on disk: one safetensors file, or shards with an index, and the config.json beside them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mla_fp4_jax.checkpoint.header import TensorEntry, check_name
from mla_fp4_jax.checkpoint.safetensors import SafetensorsFile, open_regular
from mla_fp4_jax.checkpoint.strict_json import MAX_JSON_BYTES, parse_object, quoted
from mla_fp4_jax.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_FILE = f"model{INDEX_SUFFIX}"
CONFIG_FILE = "config.json"
HF_QUANT_CONFIG_FILE = "hf_quant_config.json"
MAX_CONFIG_BYTES = 16 << 20


class Checkpoint:
    """The tensors of a checkpoint by name. Files are opened, and their headers checked, when first needed.

    Attributes:
        root: the directory.
        config_path: its config.json.
        index_name: of the index that lists the shards; None where one file holds all.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Find the files of a checkpoint.

        Args:
            path: a directory with model.safetensors, or with model.safetensors.index.json and its shards; or
                one such file with config.json beside it.

        Raises:
            CheckpointError: nothing there, or an index that is malformed or names files elsewhere.
        """
        given = Path(path)
        try:
            if not given.exists():
                raise CheckpointError(f"{given}: does not exist. Give a checkpoint directory.")
            self.root = given if given.is_dir() else given.parent
            main = _main_file(given) if given.is_dir() else given
        except OSError as error:
            raise CheckpointError(f"{given}: cannot be read ({error.strerror}).") from error
        self._files: dict[str, SafetensorsFile] = {}
        self._broken: dict[str, str] = {}
        self.index_name = main.name if main.name.endswith(INDEX_SUFFIX) else None
        if main.name.endswith(INDEX_SUFFIX):
            self._file_names = _read_index(contained(self.root, main.name))
        elif main.name.endswith(".safetensors"):
            # A file named by the user may lie anywhere; one found in a directory must lie in it.
            opened = SafetensorsFile(contained(self.root, main.name) if given.is_dir() else main)
            self._files[main.name] = opened
            self._file_names = dict.fromkeys(opened.entries, main.name)
        else:
            raise CheckpointError(f"{given}: must be a directory, a .safetensors file or its index.")
        self.config_path = contained(self.root, CONFIG_FILE)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return _read_config(self.config_path)

    @functools.cached_property
    def hf_quant_config(self) -> dict[str, Any] | None:
        """What ModelOpt's hf_quant_config.json says, where there is one."""
        if not os.path.lexists(self.root / HF_QUANT_CONFIG_FILE):
            return None
        return _read_config(contained(self.root, HF_QUANT_CONFIG_FILE))

    @property
    def file_names(self) -> list[str]:
        """The safetensors files, in order."""
        return sorted(set(self._file_names.values()))

    def open(self, file_name: str) -> SafetensorsFile:
        """One of the files."""
        if file_name in self._broken:  # not to be parsed again for every tensor
            raise CheckpointError(self._broken[file_name])
        if file_name not in self._files:
            try:
                self._files[file_name] = SafetensorsFile(contained(self.root, file_name))
            except CheckpointError as error:
                self._broken[file_name] = str(error)
                raise
        return self._files[file_name]

    def metadata_of(self, name: str) -> dict[str, str]:
        """The header's metadata of the file that holds a tensor."""
        return self._open(name).metadata

    @property
    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return self._file_names.keys()

    def entry(self, name: str) -> TensorEntry:
        """What a tensor is, by its file's own header."""
        file = self._open(name)
        if name not in file.entries:
            raise CheckpointError(f"{file.path}: has no tensor {quoted(name)}, though the index says so.")
        return file.entries[name]

    def read(self, name: str) -> np.ndarray:
        """A tensor as a view of its file; see SafetensorsFile.read."""
        return self._open(name).read(name)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, for messages."""
        return self.root / self._file_names[name]

    def unindexed(self, prefix: str) -> list[str]:
        """Tensors under a prefix that the opened files hold but the index puts elsewhere, or nowhere."""
        return [
            f"{name} in {file_name}"
            for file_name, file in self._files.items()
            for name in file.entries
            if name.startswith(prefix) and self._file_names.get(name) != file_name
        ]

    def check_unchanged(self) -> None:
        """Raise CheckpointError if an opened file has changed since."""
        for file in self._files.values():
            file.check_unchanged()

    def _open(self, name: str) -> SafetensorsFile:
        return self.open(self._file_names[name])


def contained(root: Path, name: str) -> Path:
    """root / name, once it is sure that this is a file directly in `root` and no way out of it.

    Links are followed: their target must lie in `root` too, or in the blob store of the Hugging Face hub
    cache that `root` is a snapshot of, which is all links.

    Raises:
        CheckpointError: a name with a directory in it, a missing file, a link that leads elsewhere.
    """
    where = f"{root}: the file name {quoted(name)}"
    if name != os.path.basename(name) or name in ("", ".", "..") or set(name) & {"\\", "\0"}:
        raise CheckpointError(f"{where} must be a plain name in the checkpoint's own directory.")
    path = root / name
    try:
        home, target = root.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a loop of links"
        raise CheckpointError(f"{where} cannot be read ({reason}).") from error
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parents[1] / "blobs")
    if target.parent not in allowed:
        raise CheckpointError(f"{where} is a link that leaves the directory, to {target}. Copy the file instead.")
    os.close(open_regular(path))
    return path


def _main_file(root: Path) -> Path:
    """What transformers would load: the single file, then the index; else the only safetensors file there."""
    for name in (SINGLE_FILE, INDEX_FILE):
        if os.path.lexists(root / name):
            return root / name
    found = sorted(path.name for path in root.glob("*.safetensors"))
    if len(found) == 1:
        return root / found[0]
    others = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in root.glob(suffix))
    shown = found[:4] or others[:4] or sorted(path.name for path in root.iterdir())[:4]
    listed = ", ".join(map(quoted, shown)) or "nothing"
    raise CheckpointError(
        f"{root}: must hold {SINGLE_FILE} or {INDEX_FILE}; found {listed}. Only safetensors is read: "
        "pickles can run code."
    )


def _read_config(path: Path) -> dict[str, Any]:
    with os.fdopen(open_regular(path), "rb") as file:
        raw = file.read(MAX_CONFIG_BYTES + 1)
    if len(raw) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} must be at most {MAX_CONFIG_BYTES} bytes; this is no config.")
    return parse_object(raw, str(path), constants=True)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name."""
    with os.fdopen(open_regular(path), "rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    weight_map = parse_object(raw, str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: must have a weight_map from tensor names to shard files.")
    for name, shard in weight_map.items():
        check_name(name, str(path))
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {quoted(name)} must be in a .safetensors file; got {quoted(shard)}."
            )
    for shard in set(weight_map.values()):
        contained(path.parent, shard)
    return weight_map
