"""Calls in a child process: what they return, and what is left of them where they crash or hang."""

import os
import signal
import time

import pytest
from sparsekern import isolation
from sparsekern.isolation import Failure, Worker, note


def process():
    return os.getpid()


def fail(message):
    raise ValueError(message)


def die(after):
    note(after)
    os.kill(os.getpid(), signal.SIGSEGV)


def leave():
    os._exit(3)


def hang():
    note("before it hangs")
    time.sleep(600)


def test_results_and_exceptions():
    with Worker(timeout=300) as worker:
        child = worker(process)
        assert child != os.getpid()
        assert worker(divmod, 17, 5) == (3, 2)
        assert worker(fail, "first line\nsecond") == Failure("ValueError: first line")
        assert worker(process) == child  # still the same one


def test_crashes_and_hangs():
    with Worker(timeout=300) as worker:
        assert worker(die, "the seventh kernel") == Failure(
            "the process died of SIGSEGV", "the seventh kernel"
        )
        assert worker(leave) == Failure("the process ended with status 3")
        assert worker(divmod, 17, 5) == (3, 2)
        worker.timeout = 8.0
        assert worker(hang) == Failure("no end after 8 s: killed", "before it hangs")


def test_a_lost_context_gets_a_new_process(monkeypatch: pytest.MonkeyPatch):
    """As after an illegal access on a GPU: what is asked next does not fail because of it."""
    ends, starts = [], []
    worker = Worker(timeout=1)
    monkeypatch.setattr(worker, "close", lambda: ends.append(True))

    class Pipe:
        def send(self, message):
            starts.append(message)

        def poll(self, timeout):
            return True

        def recv(self):
            return "lost", "RuntimeError: an illegal memory access was encountered"

    worker._pipe = Pipe()
    assert worker(process).reason == "RuntimeError: an illegal memory access was encountered"
    assert ends == [True]
    assert starts == [(process, ())]


def test_no_context_is_lost_where_none_is():
    assert not isolation.context_lost()
    note("nobody listens")
