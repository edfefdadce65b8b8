"""The checker of jaxtyping's import hook: `pytest --jaxtyping-packages=mla_fp4_jax,typechecker.check`."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

# An int is a float to Python's type checkers (PEP 484), so it is one here.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """Check calls of a function. Not of constructors: a pytree is made of any leaves, such as shapes or shardings."""
    return function if function.__name__ == "__init__" else _check(function)
