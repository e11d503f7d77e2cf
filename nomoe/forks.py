"""What a fork of a process lacks: the threads of torch's CPU kernels, which are not copied."""

from __future__ import annotations

import os
import threading

import torch

# threads that had torch begin threads of its own, and those of which a fork left none
_served: set[int] = set()
_deserted: set[int] = set()


def use_threads() -> None:
    """Note that torch's CPU kernels run in this thread.

    Raises:
        RuntimeError: They would wait for ever, for threads that the process it was forked from had.
    """
    if torch.get_num_threads() == 1:
        return
    here = threading.get_ident()
    if here in _deserted:
        raise RuntimeError(
            "this process was forked from one that had used torch on the CPU, whose threads it "
            "does not have; start processes with 'spawn', load the model after the fork, or call "
            "torch.set_num_threads(1) in the fork"
        )
    _served.add(here)


def _note_fork() -> None:
    # of all threads the one that forks goes on, under the same number
    here = threading.get_ident()
    deserted = here in _served | _deserted
    _served.clear()
    _deserted.clear()
    if deserted:
        _deserted.add(here)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
