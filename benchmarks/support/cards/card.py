"""A card, or the CPU in a rehearsal: its name, what it can do at most, and how its time and memory are taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MATRIX = 8192  # side of the product by which a peak is measured
# Parts of the names that torch gives, in the order in which they are looked for.
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
    """`published`: bf16 peak in FLOP/s by its vendor, None for an unknown card; `measured`: of a large product."""

    device: Any
    name: str
    published: float | None
    measured: float

    @property
    def peak(self) -> float:
        """What utilizations are shares of."""
        return self.published or self.measured

    def wait(self) -> None:
        """Until all that was launched is done."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def times(self, run: Callable[[], object], repeats: int, ahead: int = 3) -> tuple[float, float]:
        """Median seconds of a call, and of the host until it returns, after `ahead` calls that are not counted."""
        for _ in range(ahead):
            run()
        whole, host = [], []
        for _ in range(repeats):
            self.wait()
            began = time.perf_counter()
            run()
            returned = time.perf_counter()
            self.wait()
            whole.append(time.perf_counter() - began)
            host.append(returned - began)
        return statistics.median(whole), statistics.median(host)

    def memory(self, run: Callable[[], object]) -> int | None:
        """Most bytes of tensors during a call; None on a CPU, where nobody counts them."""
        if self.device.type != "cuda":
            return None
        import torch

        self.wait()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated()


def find_card(device: str, side: int) -> Card:
    """The card of this machine; exits where `device` is cuda and there is none."""
    import torch

    from pipelines.commands.plan import GPUS

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device=cuda: there is no GPU here that torch sees; device=cpu tiny=true is a rehearsal")
    at = torch.device(device)
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU (a rehearsal)"
    kind = next((kind for part, kind in NAMES.items() if part in name.lower()), None)
    a, b = (torch.randn(side, side, device=at, dtype=torch.bfloat16) for _ in range(2))
    blank = Card(at, name, GPUS[kind].tflops * 1e12 if kind else None, 1.0)
    seconds = min(blank.times(lambda: a @ b, 1)[0] for _ in range(10))
    return Card(at, name, blank.published, 2 * side**3 / seconds)


def software() -> str:
    """Versions that figures depend on."""
    import torch

    parts = [f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        parts += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    return ", ".join(parts)
