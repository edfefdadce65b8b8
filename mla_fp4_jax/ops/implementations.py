"""Which implementations of the FP4 products there are, which can run here, and what is chosen."""

from __future__ import annotations

import functools
import logging

from pallas_kernels.backend import mosaic_why_not, target_gpu, triton_why_not

logger = logging.getLogger("mla_fp4_jax")

MOSAIC, TRITON, XLA, INTERPRET = "mosaic_gpu", "triton", "xla", "triton_interpret"
NAMES = (MOSAIC, TRITON, XLA, INTERPRET)
# What implementation=None may choose, in order of preference.
PREFERENCE = (MOSAIC, TRITON, XLA)


def available() -> dict[str, str | None]:
    """Implementations by name, in order of preference; None where one can run here, else why it cannot."""
    return {name: why_not(name) for name in PREFERENCE}


def why_not(name: str) -> str | None:
    """Why an implementation cannot run on the device that is traced for, or None."""
    if name == MOSAIC:
        return mosaic_why_not(target_gpu())
    return triton_why_not(target_gpu()) if name == TRITON else None


def check_name(where: str, name: str | None) -> None:
    """Raise ValueError for an implementation that does not exist."""
    if name is not None and name not in NAMES:
        raise ValueError(
            f"{where}: implementation must be None or one of {NAMES}; got {name!r}. None chooses the fastest."
        )


@functools.lru_cache(maxsize=256)
def log_choice(where: str, name: str, why: str) -> None:
    """Say once per process and reason what was chosen."""
    logger.info("%s: %s%s", where, name, f" ({why})" if why else "")
