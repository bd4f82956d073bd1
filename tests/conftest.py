"""One random seed per run, shown in the header and with every failure; SPARSEKERN_TEST_SEED repeats a run."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Generator, Iterator

import hypothesis
import pytest
import torch

SEED = int(os.environ.setdefault("SPARSEKERN_TEST_SEED", str(random.SystemRandom().randrange(2**31))))

hypothesis.settings.register_profile("sparsekern", deadline=None, print_blob=True, max_examples=60)
hypothesis.settings.load_profile("sparsekern")


def pytest_report_header() -> str:
    return f"SPARSEKERN_TEST_SEED={SEED}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # Each test has its own random stream, so that it draws the same numbers when it runs alone.
    seed = SEED + zlib.crc32(item.nodeid.encode())
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("seed", f"SPARSEKERN_TEST_SEED={SEED} pytest '{item.nodeid}'"))
    return report


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """Let a test call ``torch.set_num_threads``."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
