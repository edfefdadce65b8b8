"""What jaxtyping's import hook checks annotations with: `pytest --jaxtyping-packages=mla_fp4_jax,typechecker.check`."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

# An int is a float to Python's type checkers (PEP 484), so it is one here.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """Check calls of a function, but for constructors: a pytree is made of any leaves (tracers, shapes, shardings)."""
    return function if function.__name__ == "__init__" else _check(function)
