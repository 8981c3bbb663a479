"""What tests of readers share."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def in_time() -> Iterator[None]:
    """A reader that never comes to an end fails its test."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.setitimer(signal.ITIMER_REAL, 60, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
