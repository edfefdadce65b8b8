"""Shared test setup: markers that skip themselves, strict promotion, several CPU devices."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

try:
    from hypothesis import settings
except ImportError:  # a bare GPU machine: the property tests stay out, see pytest_ignore_collect
    HAS_HYPOTHESIS = False
else:
    HAS_HYPOTHESIS = True
    settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
    settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests at full-size shapes")


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out modules that need hypothesis where there is none."""
    if HAS_HYPOTHESIS or collection_path.suffix != ".py":
        return None
    return True if "\nfrom hypothesis import" in collection_path.read_text() else None


def has_gpu() -> bool:
    """Whether JAX sees a CUDA device in this process."""
    try:
        return any(device.platform == "gpu" for device in jax.devices())
    except RuntimeError:
        return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    typed = bool(config.getoption("--jaxtyping-packages", default=None))
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="full-size shapes: pass --slow"))
        if item.get_closest_marker("bad_input") and typed:
            # beartype would raise its own error before ours.
            item.add_marker(pytest.mark.skip(reason="runs without the jaxtyping import hook"))
        if item.get_closest_marker("gpu") and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="no GPU in this process"))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded by the test's own name, so that every test draws its own data."""
    return np.random.default_rng(abs(hash_name(request.node.nodeid)))


def hash_name(name: str) -> int:
    """A stable 63-bit hash of a test name (Python's own hash changes from run to run)."""
    value = 1469598103934665603
    for byte in name.encode():
        value = ((value ^ byte) * 1099511628211) % (1 << 63)
    return value


@pytest.fixture
def as_bf16():
    """Round a NumPy array to bf16 and return it as a JAX array."""
    return lambda x: jnp.asarray(np.asarray(x, np.float32), jnp.bfloat16)
