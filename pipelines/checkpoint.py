"""Resume states: `<run>/state/step-00001000/`, written whole or not at all, verified before they are trusted.

A state holds the raw model, its average, every player's optimizer and the counters of the loop, as safetensors and
JSON; nothing is pickled. Randomness and data order are functions of the step, so they need no saving.
"""

from __future__ import annotations

import errno
import re
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from tokenizer.storage import (
    MANIFEST,
    FormatError,
    PipelineLoadError,
    WeightsError,
    atomic_folder,
    read_json,
    verify_manifest,
    write_json,
    write_manifest,
)

MODEL, EMA, STATE = "model.safetensors", "ema.safetensors", "state.json"
SPARE = 1.2  # a new state may be a little larger than the last, and the disk has other users

Tensors = dict[str, Tensor]


def save_state(
    run: Path,
    step: int,
    *,
    model: nn.Module,
    ema: nn.Module | None,
    optimizers: Mapping[str, Optimizer],
    counters: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write `<run>/state/step-<step>` atomically, then delete all but the newest `keep` states; return the folder.

    `model` and `ema` are the unwrapped modules; `counters` is any JSON object. Call it on the main process only.
    Raises `WeightsError` naming a tensor that is not finite, and `OSError` (ENOSPC) naming path, needed and free bytes
    if the disk is too full; older states are untouched in both cases.
    """
    parts: dict[str, Tensors] = {MODEL: model.state_dict()}
    if ema is not None:
        parts[EMA] = ema.state_dict()
    documents: dict[str, dict[str, Any]] = {STATE: {"step": step, "counters": counters}}
    for player, optimizer in optimizers.items():
        tensors, document = _pack_optimizer(optimizer)
        parts[f"optimizer-{player}.safetensors"], documents[f"optimizer-{player}.json"] = tensors, document
    target = Path(run) / "state" / f"step-{step:08d}"
    target.parent.mkdir(parents=True, exist_ok=True)
    _require_finite(parts, step)
    _require_space(target.parent, parts)
    if target.exists() and not (target / MANIFEST).exists():
        _discard(target)  # a damaged state of this very step, which `latest_state` passed over
    with atomic_folder(target, marker=MANIFEST) as folder:
        for name, tensors in parts.items():
            save_file(_detached(tensors), folder / name)
        for name, document in documents.items():
            write_json(folder / name, document)
        write_manifest(folder, step=step)
    _rotate(target, keep)
    return target


def latest_state(run: Path) -> Path | None:
    """The newest state whose manifest verifies, or None; what killed processes left behind is removed.

    A newer state that does not verify is passed over with a warning on stderr. Call it on the main process only.
    """
    folder = Path(run) / "state"
    newest = next((path for path in reversed(_states(folder)) if _verifies(path)), None) or _restore_set_aside(folder)
    for leftover in [path for place in (Path(run), folder) for path in place.glob(".[td]*")]:
        if leftover.name.startswith((".tmp-", ".del-")):
            shutil.rmtree(leftover, ignore_errors=True)
    return newest


def load_state(
    folder: Path, *, model: nn.Module, ema: nn.Module | None, optimizers: Mapping[str, Optimizer]
) -> tuple[int, dict[str, Any]]:
    """Put a state into `model`, `ema` and `optimizers` where they are; return its step and counters.

    Strict: raises a `PipelineLoadError` (`PathError`, `IntegrityError`, `FormatError`, `WeightsError`) naming the file
    and the tensor, group or player that is missing, superfluous, or of another shape, dtype or kind.
    """
    folder = Path(folder)
    manifest = verify_manifest(folder)
    expected = {MODEL, STATE, *([EMA] if ema is not None else [])}
    expected |= {f"optimizer-{player}.{kind}" for player in optimizers for kind in ("safetensors", "json")}
    if set(manifest["files"]) != expected:
        missing, extra = sorted(expected - set(manifest["files"])), sorted(set(manifest["files"]) - expected)
        raise FormatError(f"{folder}: not a state of this run: missing {missing}, unexpected {extra}")
    state = read_json(folder / STATE)
    step, counters = state.get("step"), state.get("counters")
    if not isinstance(step, int) or step != manifest.get("step") or not isinstance(counters, dict):
        raise FormatError(f"{folder / STATE}: expected counters and step {manifest.get('step')}, found step {step!r}")
    _load_module(folder / MODEL, model)
    if ema is not None:
        _load_module(folder / EMA, ema)
    for player, optimizer in optimizers.items():
        _load_optimizer(folder / f"optimizer-{player}.safetensors", optimizer)
    return step, counters


# Optimizers: tensors of the state under `<parameter index>.<name>`, everything else as JSON.


def _pack_optimizer(optimizer: Optimizer) -> tuple[Tensors, dict[str, Any]]:
    saved = optimizer.state_dict()
    tensors: Tensors = {}
    state: dict[str, dict[str, Any]] = {}
    for index, entry in saved["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                state.setdefault(str(index), {})[name] = _to_json(value, f"{index}.{name}", tensors)
    groups = [_to_json(group, f"group.{number}", tensors) for number, group in enumerate(saved["param_groups"])]
    return tensors, {**_identity(optimizer), "param_groups": groups, "state": state}


def _load_optimizer(path: Path, optimizer: Optimizer) -> None:
    document, tensors = read_json(path.with_suffix(".json")), _read_tensors(path)
    for key, expected in _identity(optimizer).items():
        if document.get(key) != expected:
            raise WeightsError(f"{path}: {_difference(key, document.get(key), expected)}")
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Any]] = {}
    try:
        for index, entry in document["state"].items():
            state[int(index)] = _from_json(entry, tensors)
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            if index != "group":
                state.setdefault(int(index), {})[name] = _laid_out_like(value, parameters[int(index)])
        groups = _from_json(document["param_groups"], tensors)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: not a state of this optimizer ({type(error).__name__}: {error})") from error
    _restore_dtypes(optimizer, parameters, state)


def _identity(optimizer: Optimizer) -> dict[str, Any]:
    """What must agree between the optimizer that was saved and the one that is loaded."""
    return {
        "kind": type(getattr(optimizer, "optimizer", optimizer)).__name__,  # accelerate wraps it
        "groups": [len(group["params"]) for group in optimizer.param_groups],
        "parameters": [f"{str(p.dtype).removeprefix('torch.')} {list(p.shape)}" for p in _parameters(optimizer)],
    }


def _difference(key: str, found: Any, expected: Any) -> str:
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        place = next(i for i in range(len(found)) if found[i] != expected[i])
        return f"{key}[{place}] is {found[place]!r}, expected {expected[place]!r}"
    return f"{key} is {found!r}, expected {expected!r}"


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _laid_out_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of `value`, with the strides of `parameter` (channels_last, say), which a fused kernel relies on."""
    if value.shape != parameter.shape:
        return value.clone()
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


def _restore_dtypes(optimizer: Optimizer, parameters: list[Tensor], state: dict[int, dict[str, Any]]) -> None:
    """torch casts state to the dtype of its parameter; float32 moments of bfloat16 weights must stay float32."""
    for index, entry in state.items():
        loaded = optimizer.state[parameters[index]]
        for name, value in entry.items():
            if isinstance(value, Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)


def _to_json(value: Any, key: str, tensors: Tensors) -> Any:
    """`value` with tensors moved to `tensors` and tuples marked, so that `_from_json` gives the same types back."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"$tensor": key}
    if isinstance(value, tuple):
        return {"$tuple": _to_json(list(value), key, tensors)}
    if isinstance(value, list):
        return [_to_json(item, f"{key}.{number}", tensors) for number, item in enumerate(value)]
    if isinstance(value, dict):
        return {name: _to_json(item, f"{key}.{name}", tensors) for name, item in value.items()}
    return value


def _from_json(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"$tensor"}:
        return tensors[value["$tensor"]].clone()
    if set(value) == {"$tuple"}:
        return tuple(_from_json(value["$tuple"], tensors))
    return {name: _from_json(item, tensors) for name, item in value.items()}


# Tensors


def _detached(tensors: Tensors) -> Tensors:
    """Copies on the CPU: safetensors refuses tied weights, which share memory, and strides."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}


def _read_tensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error


def _load_module(path: Path, module: nn.Module) -> None:
    found, expected = _read_tensors(path), module.state_dict()
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise WeightsError(f"{path}: missing tensors {missing[:5]}, unexpected tensors {extra[:5]}")
    for key, value in expected.items():
        if found[key].shape != value.shape:
            raise WeightsError(f"{path}: {key} has shape {list(found[key].shape)}, expected {list(value.shape)}")
        if found[key].dtype != value.dtype:
            raise WeightsError(f"{path}: {key} has type {found[key].dtype}, expected {value.dtype}")
    module.load_state_dict(found, strict=True)


def _require_finite(parts: dict[str, Tensors], step: int) -> None:
    for file, tensors in parts.items():
        for key, value in tensors.items():
            if (value.is_floating_point() or value.is_complex()) and not bool(torch.isfinite(value).all()):
                raise WeightsError(f"step {step} is not saved: {key} ({file}) holds a value that is not finite")


# Folders


def _require_space(folder: Path, parts: dict[str, Tensors]) -> None:
    """The old states stay until the new one is complete, so there must be room for one more."""
    states = _states(folder)
    last = sum(path.stat().st_size for path in states[-1].iterdir()) if states else 0
    coming = sum(value.nbytes for tensors in parts.values() for value in tensors.values())
    needed, free = int(SPARE * max(last, coming)), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{folder}: a state needs {needed} bytes, {free} are free; nothing was written")


def _states(folder: Path) -> list[Path]:
    """The step folders, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _verifies(path: Path) -> bool:
    try:
        verify_manifest(path)
        return True
    except (PipelineLoadError, OSError) as error:
        print(f"warning: state {path.name} is passed over: {error}", file=sys.stderr)
        return False


def _rotate(saved: Path, keep: int) -> None:
    """Delete the oldest states up to `saved`; a later one can only be damaged, and must not push `saved` out."""
    until = [path for path in _states(saved.parent) if int(path.name[5:]) <= int(saved.name[5:])]
    for path in until[: -max(keep, 1)]:
        _discard(path)


def _discard(path: Path) -> None:
    """Rename first: a kill in the middle of deleting must not leave half a state under its name."""
    discarded = path.parent / f".del-{path.name}-{uuid.uuid4().hex[:8]}"
    path.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def _restore_set_aside(folder: Path) -> Path | None:
    """A kill between the two renames that replace the only state leaves it complete under its `.del-*` name."""
    for path in folder.glob(".del-step-*"):
        target = folder / path.name.removeprefix(".del-").rpartition("-")[0]
        if not target.exists() and _verifies(path):
            path.rename(target)
            return target
    return None
