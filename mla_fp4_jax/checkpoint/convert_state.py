"""What a conversion has done so far, kept in the target directory until it is complete."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mla_fp4_jax.checkpoint.directory import Checkpoint
from mla_fp4_jax.checkpoint.safetensors import open_regular
from mla_fp4_jax.checkpoint.strict_json import MAX_JSON_BYTES, parse_object
from mla_fp4_jax.checkpoint.writer import write_json
from mla_fp4_jax.errors import CheckpointError

STATE_FILE = ".mla_fp4_convert.json"


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Make a directory and keep other conversions out of it, until the end or this process's.

    Raises:
        CheckpointError: it cannot be made, or another conversion is at work there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written to ({error.strerror}).") from error
    if os.name != "posix":  # where a directory cannot be locked
        yield
        return
    import fcntl

    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # of file systems that know no locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"{directory}: another conversion is writing to it. Wait for that one, or name another directory."
                ) from None
        yield
    finally:
        os.close(handle)


@dataclasses.dataclass
class ConvertState:
    """A conversion's progress.

    Attributes:
        directory: the target.
        of: the source's files, sizes and times of change, and the options: what must agree to go on.
        shards: file -> its size, tensors and errors, of those that are complete.
    """

    directory: Path
    of: dict[str, Any]
    shards: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, checkpoint: Checkpoint, directory: Path, options: dict[str, Any]) -> ConvertState:
        """Begin, or go on where an earlier run stopped.

        Raises:
            CheckpointError: the directory, which exists, holds something else, or is the source.
        """
        files = {
            name: _stamp(checkpoint.root / name) for name in [*checkpoint.file_names, checkpoint.config_path.name]
        }
        of = {"source": str(checkpoint.root.resolve()), "files": files, "options": options}
        if directory.resolve() == checkpoint.root.resolve():
            raise CheckpointError(f"{directory}: the target must be another directory than the source.")
        path = directory / STATE_FILE
        if os.path.lexists(path):
            with os.fdopen(open_regular(path), "rb") as file:
                found = parse_object(file.read(MAX_JSON_BYTES + 1), str(path))
            if found.get("of") != json.loads(json.dumps(of)) or not isinstance(found.get("shards"), dict):
                raise CheckpointError(
                    f"{directory}: holds another conversion, unfinished: of another source, of one that has "
                    "changed, or with other options. Empty it, or name another directory."
                )
            for leftover in directory.glob(".*.tmp"):
                leftover.unlink()
            return cls(directory, of, found["shards"])
        if any(directory.iterdir()):
            raise CheckpointError(
                f"{directory}: must be empty; it holds {min(p.name for p in directory.iterdir())!r}."
            )
        state = cls(directory, of, {})
        state._save()
        return state

    def is_done(self, file_name: str) -> bool:
        """Whether a shard is complete."""
        found = self.shards.get(file_name)
        if found is None:
            return False
        try:
            return (self.directory / file_name).stat().st_size == found["size"]
        except OSError:
            return False

    def done(self, file_name: str, tensors: list[str], nbytes: int, errors: dict[str, Any]) -> None:
        """Note that a shard is complete."""
        size = (self.directory / file_name).stat().st_size
        self.shards[file_name] = {"size": size, "tensors": tensors, "bytes": nbytes, "errors": errors}
        self._save()

    def tensors(self, file_name: str) -> list[str]:
        """Names in a complete shard."""
        return self.shards[file_name]["tensors"]

    @property
    def errors(self) -> dict[str, Any]:
        """Of every converted module."""
        return {module: error for shard in self.shards.values() for module, error in shard["errors"].items()}

    @property
    def total_size(self) -> int:
        """Bytes of all tensors."""
        return sum(shard["bytes"] for shard in self.shards.values())

    def finish(self) -> None:
        """Remove the notes: the conversion is complete."""
        (self.directory / STATE_FILE).unlink()

    def _save(self) -> None:
        write_json(self.directory / STATE_FILE, {"of": self.of, "shards": self.shards})


def _stamp(path: Path) -> list[int]:
    info = path.stat()
    return [info.st_size, info.st_mtime_ns]
