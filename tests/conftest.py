"""Every test starts from the same seed, and memory that nobody wrote reads as NaN."""

from __future__ import annotations

import contextlib
import datetime
import zlib
from collections.abc import Iterator

import pytest
import torch

from by_day import mark_what_is_not_due
from processes import RankProcesses

torch.set_num_threads(1)

with contextlib.suppress(ImportError):  # not there on a machine with a GPU
    from hypothesis import HealthCheck, settings

    # what takes how long is not a property to be tested: on a busy machine it would fail
    settings.register_profile("cpflex", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("cpflex")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """What pyproject.toml says to pytest-timeout is no error where that is not installed, as on a machine with a GPU."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds a test may take; not kept without pytest-timeout")
        parser.addini("timeout_method", "of pytest-timeout")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_what_is_not_due(items, datetime.date.today())


@pytest.fixture(autouse=True)
def _seeded_and_poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """In deterministic mode torch fills with NaN what `torch.empty` returns, to its own kernels too."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _processes(world_size: int) -> Iterator[RankProcesses]:
    ranks = RankProcesses(world_size)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two_processes() -> Iterator[RankProcesses]:
    yield from _processes(2)


@pytest.fixture(scope="session")
def four_processes() -> Iterator[RankProcesses]:
    yield from _processes(4)


@pytest.fixture
def processes(request: pytest.FixtureRequest) -> RankProcesses:
    """By `pytest.mark.parametrize("processes", [2, 4], indirect=True)`: the group of that many ranks."""
    return request.getfixturevalue({2: "two_processes", 4: "four_processes"}[request.param])
