"""The machine that a run is planned for, of what the command line says."""

from __future__ import annotations

from typing import Any

from ..config import UserError
from .budget import EXPECTED, GPUS
from .forecast import Machine


def precision_of(config: Any) -> str:
    """What layers compute in. Raises `UserError` if the run asks for another than the plan."""
    asked = {"no": "float32", "bf16": "bf16"}.get(config.train.mixed_precision or "")
    if config.precision and asked and config.precision != asked:
        raise UserError(f"precision: {config.precision}, and train.mixed_precision={config.train.mixed_precision}")
    return config.precision or asked or "bf16"


def machine_of(config: Any) -> Machine:
    """The machine to plan for."""
    kind, compiled = GPUS[config.gpu], config.train.compile
    expected = f"expected {'when compiled' if compiled else 'without train.compile'}"
    return Machine(
        f"x {config.gpu}" if config.gpu_memory is None else "GPUs",
        config.gpus,
        config.gpu_memory or kind.memory,
        config.peak_tflops or kind.tflops,
        config.utilization or EXPECTED[compiled],
        "given" if config.utilization else expected,
        precision_of(config),
    )
