"""Requests to stop that come as signals, and readers that are gone."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

ECHO_S = 0.5
"""Signals that come within this time of one are no second request."""
STOPPED = 128 + signal.SIGINT
"""Exit code of what was stopped or cancelled: what shells say after Ctrl-C."""
UNREAD = 128 + signal.SIGPIPE
"""Exit code where the reader of stdout has enough (`| head`): what shells say of a process that SIGPIPE ended."""


def give_up(stream: TextIO) -> None:
    """What is still in its buffer would be written, and fail again, when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def stop_requests(asked: Callable[[signal.Signals, int], None], *signals: signal.Signals) -> Iterator[None]:
    """While the block runs, calls `asked` with a signal and which request this is, from 1.

    One request may arrive as several signals: `timeout` sends it to the whole process group and `make` passes on what
    it got to a child that has had it. Signals that are ignored, as under `nohup`, stay so.
    """
    last, requests = -math.inf, 0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal last, requests
        if time.monotonic() - last < ECHO_S:
            return
        last = time.monotonic()
        requests += 1
        asked(signal.Signals(number), requests)

    before = {number: signal.getsignal(number) for number in signals}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
