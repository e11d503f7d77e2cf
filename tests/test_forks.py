"""Forks of a process that has used torch, whose threads they do not have."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import pytest
import torch

from nomoe import NomicMoEModel, data
from tests.test_cpu_ops import embed

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


def load() -> NomicMoEModel:
    return NomicMoEModel.from_pretrained(data.TINY, device="cpu")


def answer(pipe: Connection, run: Callable[[], object]) -> None:
    try:
        run()
        pipe.send("done")
    except RuntimeError as error:
        pipe.send(str(error))


def in_fork(run: Callable[[], object]) -> str:
    """What came of a call in a fork of this process."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=answer, args=(there, run))
    child.start()
    try:
        assert here.poll(60), "it hangs"
        return str(here.recv())
    finally:
        child.kill()
        child.join()


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_forward_in_a_fork_is_refused() -> None:
    model = load()
    for run in (lambda: embed(model), load):
        assert "forked from one that had used torch" in in_fork(run)
    assert "forked from one" in in_fork(lambda: in_fork_of_fork(model))
    embed(model)


def in_fork_of_fork(model: NomicMoEModel) -> None:
    raise RuntimeError(in_fork(lambda: embed(model)))


def test_what_the_message_advises() -> None:
    model = load()

    def with_one_thread() -> None:
        torch.set_num_threads(1)
        embed(model)

    def in_another_thread() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(embed, model).result()

    assert in_fork(with_one_thread) == "done"
    assert in_fork(in_another_thread) == "done"
    with ThreadPoolExecutor(1) as pool:
        # a thread in which nothing ran yet
        assert pool.submit(in_fork, load).result() == "done"
