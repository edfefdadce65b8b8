"""Where an FP4 linear kernel finds its weight, which may be two, one on top of the other."""

from __future__ import annotations

from pallas_kernels.ptx import Ptx


def weight_of(ptx: Ptx, tile: str, first_tiles: int, pred: str) -> tuple[str, str]:
    """Registers or operands with the addresses of the codes and scales of the weight that has an output tile.

    Args:
        ptx: where $1, $2 are the first weight's codes and scales, $5, $6 the second's.
        tile: a register; becomes the tile's number in its own weight.
        first_tiles: of the first of two weights; 0 where there is one.
        pred: a predicate register to use.
    """
    if not first_tiles:
        return "$1", "$2"
    codes, scales = ptx.regs("weight", 2, "b64")
    ptx(
        f"setp.ge.u32 {pred}, {tile}, {first_tiles};",
        f"selp.b64 {codes}, $5, $1, {pred};",
        f"selp.b64 {scales}, $6, $2, {pred};",
        f"@{pred} sub.u32 {tile}, {tile}, {first_tiles};",
    )
    return codes, scales
