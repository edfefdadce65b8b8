"""Runs a kernel's PTX on a CPU, warp by warp, as far as fp4_linear_few.py's instructions go: addresses, not speed.

Memory outside what was placed may not be touched. Copies by cp.async arrive as late as they may, when their thread
waits for them; warps run one after another, in any order, each until it waits for the others. Products are summed in
float64 and rounded to float32 after each instruction, so only what is exact in float32 is as on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

LANES = 32
_POISON = 0xFF  # shared memory at the start: NaN, whatever the dtype
_INSTRUCTION = re.compile(r"^(?:@(?P<no>!?)(?P<guard>\w+) )?(?P<op>[\w.:]+) ?(?P<args>.*);$")
_ADDRESS = re.compile(r"^\[(\$?\w+)(?:\+(-?\d+))?\]$")
_COMPARE: dict[str, Callable] = {"lt": np.less, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal}


class Memory:
    """Bytes at addresses; anything between the arrays that were placed is out of bounds."""

    def __init__(self):
        self.arrays: list[tuple[int, np.ndarray]] = []

    def place(self, address: int, array: np.ndarray) -> int:
        """Let an array's bytes lie at an address; it is written in place."""
        self.arrays.append((address, array.view(np.uint8).reshape(-1)))
        return address

    def at(self, address: int, size: int) -> np.ndarray:
        """A view."""
        assert address % min(size, 16) == 0, f"{size} bytes at {address:#x} are not aligned"
        for start, array in self.arrays:
            if start <= address and address + size <= start + array.size:
                return array[address - start : address - start + size]
        raise IndexError(f"{size} bytes at {address:#x}: nothing lies there")


def run_cta(text: str, operands: Sequence[int], memory: Memory, shared: tuple[int, int], cta: int, order) -> None:
    """Run a CTA.

    Args:
        text: a program of ptx.Ptx.
        operands: values of $0, $1, ...
        memory: global.
        shared: address and size of shared memory.
        cta: its %ctaid.x.
        order: of the warps; all of them.
    """
    local = Memory()
    local.place(shared[0], np.full(shared[1], _POISON, np.uint8))
    program = _parse(text)
    warps = [_Warp(program, operands, memory, local, cta, warp) for warp in order]
    while any(not warp.done for warp in warps):
        for warp in warps:
            warp.run()


def _parse(text: str) -> tuple[list[tuple[str, str, str, list[str]]], dict[str, int]]:
    lines, labels = [], {}
    for line in text.replace("_${:uid}", "").splitlines():
        if line in "{}" or line.startswith(".reg"):
            continue
        if line.endswith(":"):
            labels[line[:-1]] = len(lines)
            continue
        match = _INSTRUCTION.match(line)
        assert match is not None, line
        args = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", match["args"])
        lines.append((match["no"] or "", match["guard"] or "", match["op"], args))
    return (lines, labels)


class _Warp:
    """32 threads; those with the least program counter go next."""

    def __init__(self, program, operands, memory: Memory, shared: Memory, cta: int, warp: int):
        self.lines, self.labels = program
        self.operands, self.memory, self.shared = operands, memory, shared
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": np.arange(LANES, dtype=np.uint64) + np.uint64(LANES * warp),
            "%ctaid.x": np.full(LANES, cta, np.uint64),
        }
        self.at = np.zeros(LANES, np.int64)
        self.copies: list[list[tuple[int, int, int]]] = [[]]  # by group, the last one open
        self.done = False

    def run(self) -> None:
        """Until the next barrier of the CTA, or the end."""
        while not self.done:
            at = int(self.at.min())
            if at == len(self.lines):
                assert not any(self.copies), "copies under way at the end"
                self.done = True
                return
            here = self.at == at
            negated, guard, op, args = self.lines[at]
            active = here if not guard else here & ((self.registers[guard] != 0) != bool(negated))
            self.at[here] += 1
            if op == "bra":
                self.at[active] = self.labels[args[0]]
            elif op == "bar.sync":
                assert here.all()
                return
            else:
                self._execute(op, args, active)

    def _value(self, arg: str) -> np.ndarray:
        if arg.startswith("$"):
            return np.full(LANES, self.operands[int(arg[1:])], np.uint64)
        if arg.startswith("0f"):
            return np.full(LANES, int(arg[2:], 16), np.uint64)
        if re.match(r"-?\d", arg):
            return np.full(LANES, int(arg, 0) % 2**64, np.uint64)
        return self.registers[arg]

    def _set(self, name: str, value: np.ndarray, active: np.ndarray, mask: int = 2**32 - 1) -> None:
        before = self.registers.get(name, np.zeros(LANES, np.uint64))
        self.registers[name] = np.where(active, value.astype(np.uint64) & np.uint64(mask), before)

    def _addresses(self, arg: str) -> np.ndarray:
        match = _ADDRESS.match(arg)
        assert match is not None, arg
        return self._value(match[1]).astype(np.int64) + int(match[2] or 0)

    def _execute(self, op: str, args: list[str], active: np.ndarray) -> None:
        kind = op.split(".")[0]
        if kind in ("ld", "st"):
            self._access(op, args, active)
        elif kind == "cp":
            self._copy(op, args, active)
        elif kind in ("ldmatrix", "mma"):
            assert active.all()
            (self._ldmatrix if kind == "ldmatrix" else self._mma)(args)
        elif op == "bar.warp.sync":
            assert active.all()
        elif kind == "setp":
            self._set(args[0], _COMPARE[op.split(".")[1]](*map(self._value, args[1:])), active)
        else:
            values = [self._value(arg) for arg in args[1:]]
            wide = "64" in op or "wide" in op
            if not wide:
                values = [value & np.uint64(2**32 - 1) for value in values]
            self._set(args[0], _arithmetic(op, values), active, 2**64 - 1 if wide else 2**32 - 1)

    def _access(self, op: str, args: list[str], active: np.ndarray) -> None:
        """Loads and stores of one or more words of 4 bytes."""
        space = self.shared if ".shared" in op else self.memory
        store = op.startswith("st")
        names = (args[1] if store else args[0]).strip("{}").split(",")
        addresses = self._addresses(args[0] if store else args[1])
        found = {
            lane: space.at(int(addresses[lane]), 4 * len(names)).view(np.uint32) for lane in np.nonzero(active)[0]
        }
        for i, name in enumerate(names):
            if store:
                values = self._value(name)
                for lane, words in found.items():
                    words[i] = values[lane]
            else:
                loaded = np.zeros(LANES, np.uint64)
                for lane, words in found.items():
                    loaded[lane] = words[i]
                self._set(name, loaded, active)

    def _copy(self, op: str, args: list[str], active: np.ndarray) -> None:
        if op == "cp.async.commit_group":
            self.copies.append([])
        elif op == "cp.async.wait_group":
            while len(self.copies) - 1 > int(args[0]):
                for to, source, size in self.copies.pop(0):
                    self.shared.at(to, size)[:] = self.memory.at(source, size)
        else:
            to, source = self._addresses(args[0]), self._addresses(args[1])
            self.copies[-1] += [(int(to[i]), int(source[i]), int(args[2])) for i in np.nonzero(active)[0]]

    def _ldmatrix(self, args: list[str]) -> None:
        """Lane 8i + j has the address of row j of matrix i; thread 4g + t gets words t of the rows g."""
        addresses = self._addresses(args[1])
        rows = np.stack([self.shared.at(int(address), 16).view(np.uint32) for address in addresses])
        everyone = np.ones(LANES, bool)
        for i, name in enumerate(args[0].strip("{}").split(",")):
            self._set(name, rows[8 * i : 8 * i + 8].reshape(-1), everyone)

    def _mma(self, args: list[str]) -> None:
        """m16n8k16, bfloat16 into float32 (PTX ISA, "Matrix fragments for mma.m16n8k16")."""
        d, a, b, c = (arg.strip("{}").split(",") for arg in args)
        left, right, sums = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        lanes = np.arange(LANES)
        g, t = lanes // 4, lanes % 4
        for p, name in enumerate(a):
            for f, half in enumerate(_halves(self.registers[name])):
                left[g + 8 * (p & 1), 2 * t + 8 * (p >> 1) + f] = half
        for p, name in enumerate(b):
            for f, half in enumerate(_halves(self.registers[name])):
                right[2 * t + 8 * p + f, g] = half
        for i, name in enumerate(c):
            sums[g + 8 * (i >> 1), 2 * t + (i & 1)] = self.registers[name].astype(np.uint32).view(np.float32)
        with np.errstate(invalid="ignore"):
            sums = (sums + left @ right).astype(np.float32)
        for i, name in enumerate(d):
            self._set(name, sums[g + 8 * (i >> 1), 2 * t + (i & 1)].view(np.uint32), np.ones(LANES, bool))


def _halves(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of pairs of bfloat16, as float32."""
    words = words.astype(np.uint32)
    return (words << 16).view(np.float32), (words & np.uint32(0xFFFF0000)).view(np.float32)


def _pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two float32 rounded to a pair of bfloat16."""
    halves = [half.astype(jnp.bfloat16).view(np.uint16).astype(np.uint64) for half in (low, high)]
    return halves[0] | (halves[1] << np.uint64(16))


def _arithmetic(op: str, v: list[np.ndarray]) -> np.ndarray:
    kind, types = op.split(".")[0], op.split(".")[1:]
    if types[-1] == "f32" and kind == "add":
        a, b = (value.astype(np.uint32).view(np.float32) for value in v)
        return (a + b).view(np.uint32)
    if op == "mul.rn.bf16x2":
        (a, b), (c, d) = map(_halves, v)
        return _pair(a * c, b * d)
    if op == "cvt.rn.bf16x2.f32":
        high, low = (value.astype(np.uint32).view(np.float32) for value in v)
        return _pair(low, high)
    if kind in ("mov", "cvt"):
        return v[0]
    if kind == "mul" and types[0] == "hi":
        return (v[0] * v[1]) >> np.uint64(32)
    if op == "shf.r.wrap.b32":
        both = (v[1] << np.uint64(32)) | v[0]
        return both >> (v[2] % np.uint64(32))
    if op == "lop3.b32":
        assert int(v[3][0]) == 0xEA
        return (v[0] & v[1]) | v[2]
    if op == "prmt.b32":
        both = (v[1] << np.uint64(32)) | v[0]
        result = np.zeros(LANES, np.uint64)
        for i in range(4):
            digit = (v[2] >> np.uint64(4 * i)) & np.uint64(7)
            result |= ((both >> (digit * np.uint64(8))) & np.uint64(255)) << np.uint64(8 * i)
        return result
    simple: dict[str, Callable] = {
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "shr": lambda a, b: a >> b,
        "shl": lambda a, b: a << b,
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "min": np.minimum,
        "mul": lambda a, b: a * b,
        "mad": lambda a, b, c: a * b + c,
        "selp": lambda a, b, c: np.where(c != 0, a, b),
    }
    return simple[kind](*v)
