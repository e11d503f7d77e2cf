"""The kernels as compiled for a GPU, in some of their tiles, run by `emulator` against float64.

What Triton's interpreter cannot see: how the compiler lays out, pipelines, specialises and fences.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nomoe_kernels.checks import FENCES_COPIES, RELEASE
from tests.emulate_kernels import SPOILED

WORKER = Path(__file__).with_name("emulate_kernels.py")
# bfloat16 differs in few instructions
RUNS = [
    ("cuda:90", "float16"),
    ("cuda:90", "float32"),
    ("cuda:90", "bfloat16", "layers", "rows"),
    ("cuda:80", "float16"),
    ("cuda:120", "float16", "dense", "rows"),
]
TARGETS = ["cuda:90"]
if RELEASE >= FENCES_COPIES:
    RUNS += [("cuda:100", "float16")]
    TARGETS += ["cuda:100"]
# Triton's versions whose instructions `ptx` knows
KNOWN = ((3, 6), (3, 7), (3, 8))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(RELEASE[:2] not in KNOWN, reason=f"knows the assembly of {KNOWN}"),
]


def emulate(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    # the tensors are the CPU's where there is a GPU as well
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(WORKER), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def results() -> dict[tuple[str, ...], list[dict[str, Any]]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(lambda run: emulate(*run), RUNS), strict=True))


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_compiled_kernels_are_right(
    run: tuple[str, ...], results: dict[tuple[str, ...], list[dict[str, Any]]]
) -> None:
    kernels = {"tma", "specialized"} if run[0] == "cuda:90" and run[1] != "float32" else set()
    seen = {result["what"] for result in results[run]}
    part = "dense" if "dense" in run else "layer"
    for kernel in kernels | {"pointer", "small"}:
        assert any(what.startswith(f"{part}, {kernel}") for what in seen)
    assert not [result for result in results[run] if not result["error"] < result["bound"]]


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_taken_from_a_kernel_shows(target: str) -> None:
    results = emulate(target, "float16", "spoiled")
    taken = [what for what, spoil in SPOILED.items() if spoil.target == target]
    assert [result["what"] for result in results] == taken
    for result in results:
        assert result["taken"], result
        expected = SPOILED[result["what"]].refused
        if expected is not None:
            assert re.search(expected, result.get("refused", "")), result
        else:
            assert "refused" in result or result["error"] > 0.1, result
