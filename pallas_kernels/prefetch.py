"""Asking for the weights of a later kernel while this one leaves the memory idle: they wait in the L2 cache."""

from __future__ import annotations

from pallas_kernels.ptx import Ptx

_UNIT = 128


def prefetch(ptx: Ptx, address: str, size: int, ctas: int, thread: str) -> None:
    """Emit it: each CTA's first thread asks for its share of an array's first bytes, and does not wait.

    Args:
        ptx: the program.
        address: the array's, aligned to 16 bytes.
        size: bytes, a multiple of 16 and no more than the array has.
        ctas: of the grid.
        thread: register, of the CTA.
    """
    share = -(-size // (ctas * _UNIT)) * _UNIT
    number, first, left = ptx.regs("prefetch", 3)
    at, stop, done = ptx.reg("prefetch_at", "b64"), ptx.reg("prefetch_stop", "pred"), ptx.label("prefetched")
    ptx(
        f"setp.ne.u32 {stop}, {thread}, 0;",
        f"@{stop} bra {done};",
        f"mov.u32 {number}, %ctaid.x;",
        f"mul.lo.u32 {first}, {number}, {share};",
        f"setp.ge.u32 {stop}, {first}, {size};",
        f"@{stop} bra {done};",
        f"sub.u32 {left}, {size}, {first};",
        f"min.u32 {left}, {left}, {share};",
        f"cvt.u64.u32 {at}, {first};",
        f"add.u64 {at}, {at}, {address};",
        f"cp.async.bulk.prefetch.L2.global [{at}], {left};",
        f"{done}:",
    )
