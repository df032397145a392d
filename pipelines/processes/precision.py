"""In which precision a run computes, and why: what it was told, or what this machine is fast in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from ..config import UserError

Asked = Literal["auto", "no", "bf16"]
VARIABLE = "ACCELERATE_MIXED_PRECISION"  # also of `accelerate launch --mixed_precision`
BELOW_BF16 = {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"}
BELOW_AMX = {"avx512_core_bf16", "avx512_core_fp16", "avx10_1_512", "avx10_2_512"}


@dataclass(frozen=True)
class Precision:
    """`mixed` is accelerate's word for it, `no` or `bf16`; `reason` is for users, where it is not the launcher's."""

    mixed: str
    reason: str = ""


def choose_precision(asked: Asked | None, begun: str | None) -> Precision:
    """What a run computes in that was `asked` to, or was not.

    begun: what it has computed in until now, if it has begun. A run that chooses for itself keeps to that wherever it
    goes on, as the other precision gives other weights. Raises `UserError` for what launchers may say and this project
    does not do.
    """
    if asked is None:
        told = os.environ.get(VARIABLE, "no").lower()
        if told not in ("no", "bf16"):
            hidden = "its loss scaling hides non-finite steps" if told == "fp16" else "no run was tested in it"
            raise UserError(f"{told} is not supported ({hidden}); use --mixed_precision bf16, or no")
        return Precision(told)
    if asked != "auto":
        return Precision(asked, "as train.mixed_precision says")
    found, reason = found_here()
    if begun and begun != found:
        return Precision(begun, f"auto: as it began; here it would be {found}, as {reason}")
    return Precision(found, f"auto: {reason}")


def found_here() -> tuple[str, str]:
    """What this machine is fast in, and why."""
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true", "yes"):
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU has it") if has else ("no", "this GPU has no bf16")
    has_mps = torch.backends.mps.is_available() and "ACCELERATE_USE_CPU" not in os.environ
    if feature := "" if has_mps else bf16_of_cpu():
        return "bf16", f"this CPU has {feature}"
    return "no", "neither AMX nor AVX512-BF16 is there, or may be used"


def bf16_of_cpu() -> str:
    """What of this CPU multiplies bfloat16, AMX or AVX512-BF16; empty where it has neither, or neither may be used: by
    ONEDNN_MAX_CPU_ISA, which holds for oneDNN's products, or ATEN_CPU_CAPABILITY, for torch's own loops."""
    limit = next((os.environ[name] for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if name in os.environ), "")
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512") or limit.lower() in BELOW_BF16:
        return ""
    if has("_is_amx_tile_supported") and limit.lower() not in BELOW_AMX:
        return "AMX"
    return "AVX512-BF16" if has("_is_avx512_bf16_supported") else ""


def has(query: str) -> bool:
    """What torch knows of this CPU; nothing, where a version of it has no such question."""
    return bool(getattr(torch.cpu, query, lambda: False)())


def told_precision(precision: str, gpu_has_bf16: bool) -> str:
    """What it costs to compute in float32 on a GPU that could do better, and the option to give; else nothing.

    precision: what accelerate was asked for. Nothing is changed: TF32, say, would change results unasked.
    """
    if precision != "no" or not gpu_has_bf16:
        return ""
    return (
        "computing in float32: in bf16, which this GPU has, steps take about a fifth of the time and activations half "
        "the memory; train.mixed_precision=auto, or `accelerate launch --mixed_precision bf16`, asks for it"
    )
