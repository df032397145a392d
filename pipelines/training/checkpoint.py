"""Checkpoints of a run: `<run>/state/step-00001000/`, written by `torch.distributed.checkpoint`.

A checkpoint holds the weights, their average, the moments of the optimizers and the counters of the loop. Randomness
and data order are functions of (seed, rank, step), so this is enough to resume bit for bit. Any number of processes can
read it, with sharded or unsharded weights.

Unlike a pipeline folder, a checkpoint must be trusted, because torch pickles its index: load only checkpoints of your
own runs.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tokenizer.files import PipelineLoadError, check_format_version, fsync, read_json, temporary_name, write_json

from ..config import UserError, tell

Tensors = dict[str, Tensor]
FORMAT_VERSION = 1
RECORD, BEST, TENSORS = "state.json", "best.safetensors", "tensors"
CHECKPOINT = re.compile(r"step-\d{8,}")
LEFTOVER = re.compile(r"\.(tmp|del)-(step-\d{8,}|tokenizer|pipeline|\w+\.jsonl?|\w+-\d{8}\.png)-[0-9a-f]{8}(\.\w+)?")
"""Names of the partial checkpoints, snapshots, previews and other files that a killed process leaves."""


# Listing -------------------------------------------------------------------------------------------


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first. Raises `OSError` if the folder cannot be read."""
    try:
        names = os.listdir(run / "state")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((run / "state" / name for name in names if CHECKPOINT.fullmatch(name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_newest_record(run: Path) -> dict[str, Any]:
    """Return the newest readable record of a checkpoint, or {}. Does not load tensors."""
    for checkpoint in reversed(list_checkpoints(run)):
        try:
            return read_json(checkpoint / RECORD)
        except PipelineLoadError:  # reported when the checkpoint is loaded
            continue
    return {}


def remove_leftovers(run: Path) -> None:
    """Delete partial files that killed processes left in a run folder; restore a snapshot that was being replaced."""
    for path in [path for folder in (run, run / "state", run / "previews") for path in folder.glob(".[td]*")]:
        found = LEFTOVER.fullmatch(path.name)
        if found is None:
            continue
        kind, name = found.group(1), found.group(2)
        if kind == "del" and name in ("tokenizer", "pipeline") and not (run / name).exists():
            path.rename(run / name)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# Saving --------------------------------------------------------------------------------------------


def collect_tensors(model: nn.Module, average: nn.Module, optimizers: Mapping[str, Optimizer]) -> Tensors:
    """Return every tensor of a checkpoint by name: `model.*`, `average.*`, and `optimizer.<group>/<parameter>/*`.

    torch's `get_optimizer_state_dict` is unsuitable: to fill the state of parameters without a gradient, it takes a
    step with learning rate 0, which Adam would count.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for group_name, optimizer in optimizers.items():
        for parameter, moments in optimizer.state.items():
            for key, value in moments.items():
                tensors[f"optimizer.{group_name}/{names[parameter]}/{key}"] = value
    return tensors


def copy_to_cpu(tensors: Tensors) -> Tensors:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def is_finite(tensors: Tensors) -> bool:
    """Return whether all numbers in this process's shards are finite."""
    local = [value.to_local() if isinstance(value, DTensor) else value for value in tensors.values()]
    return all(bool(torch.isfinite(value).all()) for value in local if value.is_floating_point())


def write_checkpoint(
    run: Path, step: int, tensors: Tensors, record: dict[str, Any], best: Tensors | None, *, main: bool, sharded: bool
) -> None:
    """Write `<run>/state/step-<step>` atomically, then delete all but the two newest checkpoints.

    sharded: every process calls this and writes its shards; otherwise only the main process does. best: the best
    averaged weights, unsharded, on the main process. Raises `OSError`.
    """
    target = run / "state" / f"step-{step:08d}"
    temporary = temporary_name(target)
    if sharded:
        agreed = [temporary]
        torch.distributed.broadcast_object_list(agreed)
        temporary = agreed[0]
    try:  # no I/O before `dcp.save`, which makes the folder: an error on one process would leave the others waiting
        writer = dcp.FileSystemWriter(temporary / TENSORS, sync_files=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that a single process saves
            dcp.save(tensors, storage_writer=writer, no_dist=not sharded)
        if main:
            if best is not None:
                save_file({name: value.contiguous() for name, value in best.items()}, temporary / BEST)
                fsync(temporary / BEST)
            write_json(temporary / RECORD, {"format_version": FORMAT_VERSION, "step": step, **record})
            for path in (temporary / RECORD, temporary / TENSORS, temporary):
                fsync(path)
            if target.exists():  # damaged, and skipped on loading
                _discard(target)
            temporary.rename(target)
            fsync(target.parent)
            fsync(run)
            for old in [path for path in list_checkpoints(run) if step_of(path) <= step][:-2]:
                _discard(old)
    except dcp.CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        raise OSError(getattr(error, "errno", None), f"process {rank}: {error}") from failed
    finally:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)


def _discard(checkpoint: Path) -> None:
    """Rename a checkpoint before deleting it, so that a kill cannot leave part of it under its name."""
    discarded = temporary_name(checkpoint, ".del")
    checkpoint.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)


# Loading -------------------------------------------------------------------------------------------


def load_newest(
    checkpoints: Sequence[Path],
    model: nn.Module,
    average: nn.Module,
    optimizers: Mapping[str, Optimizer],
    all_agree: Callable[[bool], bool] = bool,
    *,
    main: bool = True,
) -> tuple[dict[str, Any], Tensors | None]:
    """Load the newest usable checkpoint into these objects; return its record and, on the main process, its best
    weights, if any.

    checkpoints: oldest first, the same on all processes; if empty, return ({}, None). all_agree: returns whether a bool
    is true on all processes. Skips unusable checkpoints with a warning. Raises `UserError` if no checkpoint is usable.
    """
    for checkpoint in reversed(checkpoints):
        error: BaseException | None = None
        try:
            record = read_json(checkpoint / RECORD)
            check_format_version(record, FORMAT_VERSION, checkpoint / RECORD)
            if record.get("step") != step_of(checkpoint):
                raise ValueError(f"{RECORD} does not belong to step {step_of(checkpoint)}")
            best = load_file(checkpoint / BEST) if main and record.get("best") else None
            if best is not None and shapes_of(best) != shapes_of(average.state_dict()):
                raise ValueError(f"{BEST} is not of this model")
            load_tensors(checkpoint / TENSORS, model, average, optimizers)
        # A damaged file may raise anything; torch's own error is not an `Exception`.
        except (Exception, dcp.CheckpointException) as caught:
            error = caught
        if all_agree(error is None):
            return record, best
        if error is not None:
            tell(f"warning: {checkpoint} is skipped: {_describe_error(error)}")
    if checkpoints:
        raise UserError(
            f"{checkpoints[0].parent}: none of its {len(checkpoints)} checkpoints can be loaded; nothing was changed. "
            f"To start over, choose another out=, or delete {checkpoints[0].parent.parent}"
        )
    return {}, None


def shapes_of(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


def load_tensors(folder: Path, model: nn.Module, average: nn.Module, optimizers: Mapping[str, Optimizer]) -> None:
    """Load the tensors of a checkpoint into the model, its average and the optimizers. Raises `ValueError` for a
    missing or unexpected tensor, and torch's own errors for another shape and for damaged files."""
    reader = dcp.FileSystemReader(folder)
    found: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = collect_tensors(model, average, {})
    parameters = dict(model.named_parameters())
    moments: dict[str, tuple[Optimizer, nn.Parameter, str]] = {}
    for key, stored in found.items():
        if not key.startswith("optimizer."):
            continue
        group_name, name, entry = key.removeprefix("optimizer.").split("/")
        parameter = parameters[name]
        if stored.size == parameter.shape:
            tensors[key] = torch.empty_like(parameter, dtype=stored.properties.dtype, requires_grad=False)
        else:  # a step count
            tensors[key] = torch.empty(stored.size, dtype=stored.properties.dtype, device=parameter.device)
        moments[key] = optimizers[group_name], parameter, entry
    if differing := sorted(set(found) ^ set(tensors)):
        raise ValueError(f"{differing[0]} is {'not expected' if differing[0] in found else 'missing'}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that each process reads alone
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    for optimizer in optimizers.values():
        optimizer.state.clear()  # may come from a newer checkpoint that another process could not load
    for key, (optimizer, parameter, entry) in moments.items():
        optimizer.state[parameter][entry] = tensors[key]


def _describe_error(error: BaseException) -> str:
    """Return an error's class and first line; for torch's checkpoint error, those of its cause."""
    if isinstance(error, dcp.CheckpointException):
        error = min(error.failures.items())[1][0]
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
