"""Which modules a quantisation config means: plain names, globs and "re:" patterns, in time that is bounded.

Configs come from strangers, and Python's `re` takes exponential time on some patterns. Those here are run as a set of
states over the name, one pass: pattern length times name length at most.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable

from mla_fp4_jax.checkpoint.strict_json import quoted
from mla_fp4_jax.errors import CheckpointError

MOST_PATTERNS = 4096
LONGEST_PATTERN = 1024
MOST_INSTRUCTIONS = 4096
LONGEST_NAME = 512
MOST_REPEATS = 64

_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}


class Patterns:
    """A list of module names and patterns, and whether it means a module.

    A plain name means a module whose dotted name contains it as whole parts ("self_attn" means
    "model.layers.0.self_attn.o_proj"); one with *, ? or [ is a glob over the whole name; "re:" begins a regular
    expression that must match from the name's start.
    """

    def __init__(self, texts: Iterable[str]):
        """Compile.

        Raises:
            CheckpointError: too many patterns, or one that is too long or uses what is not understood.
        """
        self.texts = tuple(texts)
        self._names = {text for text in self.texts if not _is_pattern(text)}
        patterns = [text for text in self.texts if _is_pattern(text)]
        if len(patterns) > MOST_PATTERNS or any(len(text) > LONGEST_PATTERN for text in patterns):
            raise CheckpointError(
                f"a list of modules must hold at most {MOST_PATTERNS} patterns of {LONGEST_PATTERN} characters."
            )
        self._programs = [_compile(text[3:]) for text in patterns if text.startswith("re:")]
        self._globs = [re.compile(fnmatch.translate(text)) for text in patterns if not text.startswith("re:")]

    def match(self, module: str) -> bool:
        """Whether the list means this module."""
        if len(module) > LONGEST_NAME:
            return False
        if self._names:
            parts = module.split(".")
            if any(
                ".".join(parts[i:j]) in self._names for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)
            ):
                return True
        return any(glob.match(module) for glob in self._globs) or any(_run(p, module) for p in self._programs)


def _is_pattern(text: str) -> bool:
    return text.startswith("re:") or any(c in text for c in "*?[")


# A program is a list of instructions: ("char", test), ("split", a, b), ("begin",), ("end",), ("match",).


@functools.lru_cache(256)
def _compile(text: str) -> tuple[tuple, ...]:
    return tuple(_Compiler(text).program())


class _Compiler:
    """Recursive descent over the pattern; each method returns the instructions of what it read, relative jumps."""

    def __init__(self, text: str):
        self._text, self._at, self._depth = text, 0, 0

    def program(self) -> list[tuple]:
        code = self._alternatives()
        if self._at != len(self._text):
            raise self._wrong("an unmatched )")
        return [*code, ("match",)]

    def _alternatives(self) -> list[tuple]:
        self._depth += 1
        if self._depth > 32:
            raise self._wrong("groups nested too deeply")
        branches = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            branches.append(self._sequence())
        self._depth -= 1
        code = branches.pop()
        for branch in reversed(branches):
            code = [("split", 1, len(branch) + 2), *branch, ("split", len(code) + 1, len(code) + 1), *code]
        return self._bounded(code)

    def _sequence(self) -> list[tuple]:
        code: list[tuple] = []
        while self._peek() not in ("", "|", ")"):
            code += self._repeated()
        return self._bounded(code)

    def _repeated(self) -> list[tuple]:
        code = self._atom()
        while (c := self._peek()) in ("*", "+", "?", "{") and c:
            low, high = self._count()
            if self._peek() == "?":  # lazy: the same set of matches
                self._at += 1
            more = self._bounded(code * max(low, 1 if high is None else low))
            if high is None:
                if low == 0:
                    code = [("split", 1, len(code) + 2), *code, ("split", -len(code), 1)]
                else:
                    code = [*more, ("split", -len(code), 1)]
            else:
                optional: list[tuple] = []
                for _ in range(high - low):
                    optional = self._bounded([("split", 1, len(code) + len(optional) + 1), *code, *optional])
                code = [*(code * low), *optional]
            code = self._bounded(code)
        return code

    def _count(self) -> tuple[int, int | None]:
        c = self._next()
        if c != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[c]
        end = self._text.find("}", self._at)
        match = re.fullmatch(r"([0-9]{1,3})(,([0-9]{0,3}))?", self._text[self._at : end] if end >= 0 else "")
        if not match:
            raise self._wrong("a { that counts nothing")
        self._at = end + 1
        low = int(match[1])
        high = low if match[2] is None else int(match[3]) if match[3] else None
        if low > MOST_REPEATS or (high is not None and not low <= high <= MOST_REPEATS):
            raise self._wrong(f"a count beyond {MOST_REPEATS}")
        return low, high

    def _atom(self) -> list[tuple]:
        c = self._next()
        if c == "(":
            if self._peek() == "?":
                if self._text[self._at : self._at + 2] != "?:":
                    raise self._wrong("a group that begins with (?")
                self._at += 2
            code = self._alternatives()
            if self._next() != ")":
                raise self._wrong("a group without its )")
            return code
        if c == "[":
            return [("char", self._set())]
        if c == ".":
            return [("char", lambda _: True)]
        if c == "^":
            return [("begin",)]
        if c == "$":
            return [("end",)]
        if c == "\\":
            return [("char", self._escape())]
        if c in "*+?{":
            raise self._wrong(f"a {c} that repeats nothing")
        return [("char", lambda x, c=c: x == c)]

    def _escape(self) -> Callable[[str], bool]:
        c = self._next()
        if c.lower() in _CLASSES and c:
            test = _CLASSES[c.lower()]
            return test if c.islower() else lambda x: not test(x)
        if not c or c.isalnum():
            raise self._wrong(f"the escape \\{c}")
        return lambda x: x == c

    def _set(self) -> Callable[[str], bool]:
        negated = self._peek() == "^"
        self._at += negated
        tests: list[Callable[[str], bool]] = []
        first = True
        while (c := self._next()) != "]" or first:
            first = False
            if not c:
                raise self._wrong("a [ without its ]")
            if c == "\\":
                tests.append(self._escape())
            elif self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                last = self._next()
                tests.append(lambda x, a=c, b=last: a <= x <= b)
            else:
                tests.append(lambda x, c=c: x == c)
        return lambda x: any(test(x) for test in tests) != negated

    def _bounded(self, code: list[tuple]) -> list[tuple]:
        if len(code) > MOST_INSTRUCTIONS:
            raise self._wrong("too many repeats")
        return code

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        c = self._peek()
        self._at += 1
        return c

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"the pattern {quoted(self._text)} has {what}, which is not understood.")


def _run(program: tuple[tuple, ...], name: str) -> bool:
    states = _closure(program, [0], name, 0)
    for at, c in enumerate(name):
        if any(program[s][0] == "match" for s in states):
            return True
        states = _closure(
            program, [s + 1 for s in states if program[s][0] == "char" and program[s][1](c)], name, at + 1
        )
        if not states:
            return False
    return any(program[s][0] == "match" for s in states)


def _closure(program: tuple[tuple, ...], begin: list[int], name: str, at: int) -> list[int]:
    """The states reached without reading a character."""
    seen, stack, reached = set(begin), list(begin), []
    while stack:
        state = stack.pop()
        kind, *jumps = program[state]
        if kind == "split":
            follow = [state + jump for jump in jumps]
        elif (kind == "begin" and at == 0) or (kind == "end" and at == len(name)):
            follow = [state + 1]
        else:
            follow = []
            if kind in ("char", "match"):
                reached.append(state)
        for other in follow:
            if other not in seen:
                seen.add(other)
                stack.append(other)
    return reached
