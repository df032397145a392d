"""A GPU, or the CPU for a trial run: its name and peak, and measurements of time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.commands.plan import GPUS

MATRIX = 8192  # side of the matrix product that measures the peak
# Parts of the names that torch reports, in order of precedence.
NAMES = {
    "h200": "h200",
    "h100 pcie": "h100_pcie",
    "h100": "h100",
    "b200": "b200",
    "a100-pcie-40": "a100_40",
    "a100-sxm4-40": "a100_40",
    "a100": "a100",
    "mi300x": "mi300x",
    "l40s": "l40s",
    "nvidia l4": "l4",
    "rtx 4090": "rtx4090",
}


@dataclass(frozen=True)
class Card:
    """bf16 peaks in FLOP/s: `published` by the vendor (None for an unknown card), `measured` for a large product."""

    device: Any
    name: str
    published: float | None
    measured: float

    @property
    def peak(self) -> float:
        """The reference for utilization."""
        return self.published or self.measured

    def wait(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def times(self, run: Callable[[], object], repeats: int, warmup: int = 3, in_a_row: int = 1) -> tuple[float, float]:
        """Median seconds until a call is done, and until it returns to the host, after `warmup` calls. in_a_row: the
        number of calls between two waits, divided out; a GPU computes one while the host prepares the next."""
        in_a_row = in_a_row if self.device.type == "cuda" else 1
        for _ in range(warmup):
            run()
        whole, host = [], []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            for _ in range(in_a_row):
                run()
            returned = time.perf_counter()
            self.wait()
            whole.append((time.perf_counter() - start) / in_a_row)
            host.append((returned - start) / in_a_row)
        return statistics.median(whole), statistics.median(host)

    def memory(self, run: Callable[[], object]) -> int | None:
        """Peak bytes of tensors during a call; None on a CPU, where torch does not count them."""
        if self.device.type != "cuda":
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated()


def find_card(device: str, side: int) -> Card:
    """Return this machine's GPU, or its CPU; exit if `device` is cuda and torch sees no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device=cuda: torch sees no GPU; try device=cpu tiny=true")
    at = torch.device(device)
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU (trial run)"
    kind = next((kind for part, kind in NAMES.items() if part in name.lower()), None)
    a, b = (torch.randn(side, side, device=at, dtype=torch.bfloat16) for _ in range(2))
    blank = Card(at, name, GPUS[kind].tflops * 1e12 if kind else None, 1.0)
    seconds = min(blank.times(lambda: a @ b, 1)[0] for _ in range(10))
    return Card(at, name, blank.published, 2 * side**3 / seconds)


def describe_software() -> str:
    parts = [f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        parts += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    return ", ".join(parts)
