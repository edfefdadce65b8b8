"""JSON from files that nobody vouches for: bounded size and memory, no duplicates, no surprises."""

from __future__ import annotations

import json
from typing import Any

from mla_fp4_jax.errors import CheckpointError

# safetensors itself refuses longer headers; indexes of the largest checkpoints are a tenth of this.
MAX_JSON_BYTES = 100_000_000
# An empty list or object costs 60 times its two bytes once parsed. No honest header or index has brackets
# this dense (a header's shortest entry has 3 in 49 bytes). All else costs up to 25 times its text, an honest
# header 12 times.
LEAST_BYTES_PER_BRACKET = 8
LONGEST_QUOTE = 160


def quoted(text: object) -> str:
    """A name from a file, safe to print: escaped, and cut where it gets long."""
    shown = ascii(text)
    return shown if len(shown) <= LONGEST_QUOTE else f"{shown[:LONGEST_QUOTE]}... ({len(shown)} characters)"


def parse_object(raw: bytes, where: str, *, constants: bool = False) -> dict[str, Any]:
    """Parse UTF-8 JSON that must be an object.

    Args:
        raw: the text's bytes.
        where: what it is, for messages: "model.safetensors: the header".
        constants: let NaN and Infinity pass, which Python writes into configs; whoever uses a number checks it.

    Raises:
        CheckpointError: not UTF-8, not JSON (NaN and Infinity are not), nested or bracketed beyond any honest
            use, an object with the same key twice, anything but an object.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(f"{where} must be at most {MAX_JSON_BYTES} bytes; this is no such file.")
    if raw.count(b"[") + raw.count(b"{") > 64 + len(raw) // LEAST_BYTES_PER_BRACKET:
        raise CheckpointError(f"{where} is made of brackets; refused unparsed.")
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=float if constants else _no_constant
        )
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}).") from None
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply.") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON ({quoted(str(error))}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be a JSON object; got {type(value).__name__}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise CheckpointError(f"the key {quoted(twice)} occurs twice.")
    return value


def _no_constant(name: str) -> None:
    raise CheckpointError(f"{name} is no JSON number.")
