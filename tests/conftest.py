"""Strict settings for every test: no silent promotion of dtypes or ranks, and 8 CPU devices so that sharding is real.

Set as environment variables before anything imports jax, so that the subprocesses of tests run under them too. Warnings are
errors through pyproject.toml.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make exhaustive` is `pytest --exhaustive -m exhaustive`."""
    parser.addoption("--exhaustive", action="store_true", help="also every combination, not only a covering selection")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs in pytest's cache, for the other workers, the subprocesses of tests, and the next run.

    Compiling is most of the suite's time: to initialise, run and differentiate two tiny models took 170 s with an empty cache and
    20 s with a full one, on two busy cores. Entries are keyed by program, flags and versions; `pytest --cache-clear` empties it.
    """
    if (cache := getattr(config, "cache", None)) is not None:  # `-p no:cacheprovider` leaves it out
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache.mkdir("jax")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }


@pytest.fixture(autouse=True)
def _fewer_programs() -> Iterator[None]:
    """Lets go of compiled programs when there are many.

    A program for 8 devices takes about 2,000 memory mappings, and a process may have 65,530 (vm.max_map_count): at the
    next one XLA's compiler dies of a segmentation fault.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory with real test data (GSM8K, BFCL, the published tokenizer), which is not part of the project."""
    path = PROJECT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the shared test data is not beside the project (../shared/data)")
    return path


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips `parity` where the reference implementation is not installed; leaves `exhaustive` to --exhaustive."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    for item in items:
        if missing and item.get_closest_marker("parity"):
            item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}: run `make parity`"))
    if not config.getoption("--exhaustive"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
