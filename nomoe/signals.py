"""Signals that ask a process to end."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any


def end_politely() -> dict[signal.Signals, Any]:
    """Have signals that end a process raise SystemExit, so that unfinished output is removed.

    Returns:
        The handlers that they had; one that was ignored, as under nohup, stays so.
    """
    # a terminal that closes sends SIGHUP, which Windows has not
    asking = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    heeded = [one for one in asking if signal.getsignal(one) != signal.SIG_IGN]
    return {one: signal.signal(one, _exit) for one in heeded}


def _exit(number: int, frame: FrameType | None) -> None:
    # as a shell reports a process that a signal ended
    sys.exit(128 + number)
