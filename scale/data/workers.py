"""Processes that read ahead. They leave signals to the trainer, never outlive it, and what killed one is said in one line."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.queues
import multiprocessing.util
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from scale.errors import ScaleError
from scale.lifeline import die_with

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_SHARED = "they hand on batches through /dev/shm: `df /dev/shm` tells if it is full; data.workers=0 needs none"
_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def leave_signals_to_the_trainer() -> Callable[[int], None]:
    """A `worker_init_fn`. A scheduler signals every process of a job, a terminal every one of its group: a worker that
    died of it would take the checkpoint with it. Workers of this thread end with it, at the latest.
    """
    forked = multiprocessing.get_start_method() == "fork"
    # Linux ties a child to the life of the thread that made it
    bound = forked and threading.current_thread() is threading.main_thread()
    return partial(_init, os.getpid() if bound else None)


def _init(parent: int | None, worker: int) -> None:
    signal.set_wakeup_fd(-1)  # it is the trainer's
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if parent is not None:
        die_with(parent)
    # a batch for which there is no room is else dropped with a traceback, and the trainer waits for it for ever
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_cannot_hand_on)  # type: ignore[attr-defined]


def _cannot_hand_on(error: Exception, batch: object) -> NoReturn:
    os._exit(1)


def start_reading(loader: DataLoader[Any]) -> Iterator[Any]:
    """The iterator of a loader, whose workers are started. A signal that reaches one before it has chosen its handlers
    waits until then: torch gives it one that ends it."""
    if loader.num_workers:
        multiprocessing.util.get_temp_dir()  # made here it is removed here; a killed worker would leave one of its own
    others = multiprocessing.active_children()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with _handlers_wait():
            return iter(loader)
    except OSError as error:
        raise ScaleError(
            f"data.workers = {loader.num_workers}: cannot be started: {error.strerror} ({_SHARED})"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _workers.update(child for child in multiprocessing.active_children() if child not in others)


@contextmanager
def _handlers_wait() -> Iterator[None]:
    """Python's signal handlers run after this block: what one raises inside a hook of a fork would be printed and lost. The
    mask does not keep a signal from the other threads, for which Python calls the handler here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {n: h for n in _SIGNALS if callable(h := signal.getsignal(n))}
    heard: list[int] = []
    for number in handlers:
        signal.signal(number, lambda number, frame: heard.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in heard:
            handlers[signal.Signals(late)](late, None)


@contextmanager
def dead_workers_in_one_line() -> Iterator[None]:
    """What DataLoader raises, wherever the trainer is, when a worker was killed or found no room, as ScaleError."""
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        text = str(error)
        if "DataLoader worker" in text and "No space left on device" in text:
            raise ScaleError(f"/dev/shm: No space left on device for what data workers have read ({_SHARED})") from None
        _wait_for_the_dead()
        dead = next((worker for worker in list(_workers) if worker.exitcode not in (None, 0)), None)
        if dead is None and not text.startswith("DataLoader worker"):
            raise
        number = -dead.exitcode if dead is not None and dead.exitcode is not None else 0
        how = f"was killed by signal {number}" if number > 0 else "ended unexpectedly"
        killer = "the kernel's out-of-memory killer does that: `dmesg` tells; " if number in (0, signal.SIGKILL) else ""
        raise ScaleError(f"data.workers: a data worker {how} ({killer}{_SHARED})") from None


def _wait_for_the_dead() -> None:
    """What a worker held is closed a moment before it can be seen to have ended; DataLoader's own handler, which raises
    wherever it finds the main thread, is not to do so meanwhile."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    for worker in list(_workers):
        worker.join(0.2)
    if main:
        signal.signal(signal.SIGCHLD, handler)


def _end_workers() -> None:
    """Before multiprocessing sends each a SIGTERM, which they do not hear, and waits for them."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader raises when a worker is killed
    for worker in list(_workers):
        if worker.is_alive():
            worker.kill()


atexit.register(_end_workers)  # after, so run before, the one of multiprocessing
