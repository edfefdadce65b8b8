"""A PTX program as text, for the parts of a kernel that Pallas has no words for."""

from __future__ import annotations

from collections.abc import Sequence


class Ptx:
    """Collects instructions and registers; text() is one `{ ... }` block for inline_asm.

    Labels must be made with label(): the program may be inlined more than once.
    """

    def __init__(self):
        self._lines: list[str] = []
        self._registers: list[str] = []
        self._names: dict[str, int] = {}

    def __call__(self, *lines: str) -> None:
        """Append instructions; each ends with ";" or is a label."""
        self._lines += lines

    def reg(self, name: str, kind: str = "b32") -> str:
        """A register; the name is made unique."""
        return self.regs(name, 1, kind)[0]

    def regs(self, name: str, count: int, kind: str = "b32") -> list[str]:
        """Several registers."""
        unique = self._unique(name)
        self._registers.append(f".reg .{kind} {unique}<{count}>;")
        return [f"{unique}{i}" for i in range(count)]

    def divide(self, quotient: str, remainder: str, number: str, divisor: int, limit: int) -> None:
        """number / divisor for a number below `limit`; ptxas itself would go through floating point.

        remainder may be number itself, quotient may not.
        """
        if divisor & (divisor - 1) == 0:
            self(f"shr.u32 {quotient}, {number}, {divisor.bit_length() - 1};")
        else:  # n ceil(2^32 / d) is off by less than n d: right as long as that is below 2^32
            if limit * divisor >= 2**32:
                raise ValueError(f"Ptx.divide: limit * divisor must be below 2^32; got {limit} * {divisor}.")
            self(f"mul.hi.u32 {quotient}, {number}, {-(-(2**32) // divisor)};")
        self(f"mad.lo.u32 {remainder}, {quotient}, -{divisor}, {number};")

    def label(self, name: str) -> str:
        """A label, used both as a target and, followed by ":", as a place."""
        return f"{self._unique(name)}_${{:uid}}"

    def text(self) -> str:
        """The whole block."""
        return "{\n" + "\n".join([*self._registers, *self._lines]) + "\n}"

    def _unique(self, name: str) -> str:
        number = self._names.get(name, 0)
        self._names[name] = number + 1
        return f"{name}_{number}_"


def vector(registers: Sequence[str]) -> str:
    """ "{a,b,c}"."""
    return "{" + ",".join(registers) + "}"
