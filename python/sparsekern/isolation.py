"""Calls in a process of their own: a kernel that crashes or hangs must not take along what asked for it.

An illegal access leaves a CUDA context in which every later call fails, a deadlocked kernel never ends, and a
wrong address on the CPU ends the process. So what may do that runs in a child, which is replaced.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, TypeVar

import torch

R = TypeVar("R")

START_SECONDS = 300.0
"""How long a child may take to import torch, on a slow file system."""


@dataclass(frozen=True)
class Failure:
    """A call that gave no result.

    Attributes:
        reason: for people: the exception, the signal or the time that was waited.
        at: what :func:`note` said last.
    """

    reason: str
    at: str = ""


class Worker:
    """A child process that runs one call after the other. Use it as a context manager.

    Args:
        timeout: seconds that a call may take from its start, or from its last :func:`note`, to its end.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._process: Any = None
        self._pipe: Connection | None = None

    def __call__(self, task: Callable[..., R], *arguments: object) -> R | Failure:
        """``task(*arguments)``, or the :class:`Failure` where it raises, ends the process or takes too long.

        ``task`` is a function of a module that the child can import; arguments and result are pickled.
        """
        at = ""
        try:
            pipe = self._pipe or self._start()
            pipe.send((task, arguments))
            while True:
                if not pipe.poll(self.timeout):
                    self.close()
                    return Failure(f"no end after {self.timeout:g} s: killed", at)
                kind, content = pipe.recv()
                if kind == "note":
                    at = content
                elif kind == "result":
                    result: R = content
                    return result
                else:
                    if kind == "lost":
                        self.close()
                    return Failure(content, at)
        except (EOFError, OSError):
            return Failure(self._epitaph(), at)

    def close(self) -> None:
        """End the child; a later call starts another."""
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if pipe is not None:
            pipe.close()
        if process is not None:
            process.kill()
            process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> Connection:
        # Not forked: a process that has used CUDA, or has threads, cannot be.
        context = multiprocessing.get_context("spawn")
        pipe, end = context.Pipe()
        self._process, self._pipe = context.Process(target=_serve, args=(end,), daemon=True), pipe
        self._process.start()
        end.close()
        if not pipe.poll(START_SECONDS):
            raise OSError(f"no process after {START_SECONDS:g} s")
        pipe.recv()
        return pipe

    def _epitaph(self) -> str:
        process = self._process
        if process is None:
            return "the process could not be started"
        process.join(5.0)
        code = process.exitcode
        self.close()
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"the process died of {signal.Signals(-code).name}"
        return f"the process ended with status {code}"


_pipe: Connection | None = None


def note(what: str) -> None:
    """Say what the call does now, for a :class:`Failure`, and that it is alive. Nothing in a parent."""
    if _pipe is not None:
        _pipe.send(("note", what))


def _serve(pipe: Connection) -> None:
    global _pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _pipe = pipe
    pipe.send(("ready", None))
    while True:
        try:
            task, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("result", task(*arguments)))
        except Exception as error:
            pipe.send(("lost" if context_lost() else "raised", first_line(error)))


def first_line(error: Exception) -> str:
    """Its type and the start of its message: some of torch's go on for pages."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def context_lost() -> bool:
    """Whether a kernel has left a CUDA context in which nothing runs any more."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
