"""A codebook of 16,384 codes trains in little memory, whichever quantizer it belongs to.

A matrix of vectors x codes would be 128 MB here, and a plain softmax over it, with its gradient, holds several. What
one training step takes is measured in a process of its own, forked from one that has imported everything
(`python test_large_codebooks.py NAME...`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_file

from tokenizer.quantizers import Quantizer

CODES, WIDTH, IMAGES, TOKENS = 16_384, 8, 8, 256
MATRIX = CODES * IMAGES * TOKENS * 4 / 2**20  # MiB
LIMIT = MATRIX / 2  # what one matrix, or half of one twice, would break; 2 GB is promised
SIZES: dict[str, Any] = {"codes": CODES, "dim": WIDTH, "kmeans_iterations": 1}


def large(name: str) -> dict[str, Any] | None:
    """The configuration of a large codebook, or several; None for quantizers without one."""
    fields = Quantizer.find(name).Config.model_fields
    if "codes" in fields:
        return {key: value for key, value in SIZES.items() if key in fields}
    more = {"scales": (1, 4, 16)} if name == "multiscale" else {"depth": 2}
    return {**more, "book": {"kind": "ema", **SIZES}} if "book" in fields else None


def memory(field: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at most. (`ru_maxrss` would begin with what its parent had.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**10


def measure(name: str) -> dict[str, float]:
    """One training step, forward and backward: by how many MiB its peak stands above what was there before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quantizer = Quantizer.create(name, **large(name)).train()
    z = torch.randn(IMAGES, WIDTH, 16, TOKENS // 16, requires_grad=True)
    before, since = memory("VmRSS"), time.monotonic()
    z_q, tokens, losses = quantizer.quantize(z)
    loss = (z_q - 1).square().mean() + sum(quantizer.loss_weights[key] * value for key, value in losses.items())
    loss.backward()
    peak = memory("VmHWM")
    assert torch.isfinite(z.grad).all() and z.grad.abs().sum() > 0 and len(tokens.unique()) > 1000
    return {"mib": peak - before, "seconds": time.monotonic() - since}


def in_a_child(name: str) -> dict[str, float] | None:
    """What `measure` finds in a forked process, whose peak begins with what it has; None if that failed."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, json.dumps(measure(name)).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        printed = pipe.read()
    return json.loads(printed) if os.waitpid(child, 0)[1] == 0 else None


USUAL = ("ema", "gumbel")  # nearest codes, and a softmax over all of them
NAMES = [name for name in Quantizer.available() if large(name)]


def asked(request: pytest.FixtureRequest) -> list[str]:
    """Those of which a test is run."""
    here = [item for item in request.session.items if item.path == request.path]
    return [item.callspec.params["name"] for item in here if isinstance(item, pytest.Function)]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(run_file(__file__, *asked(request)).splitlines()[-1])


@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux counts it")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n not in USUAL else ()) for n in NAMES])
def test_a_training_step_takes_little_memory(found, name):
    print(f"{name}: {found[name]['mib']:.0f} MiB, {found[name]['seconds']:.1f} s")
    assert found[name]["mib"] < LIMIT


if __name__ == "__main__":
    print(json.dumps({name: in_a_child(name) for name in sys.argv[1:]}))
