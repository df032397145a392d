"""Checkpoints of a run: `<run>/state/step-00001000/`, written by `torch.distributed.checkpoint`.

A checkpoint holds the weights, their average, the moments of the optimizers and the counters of the loop. Randomness
and the order of the data are functions of (seed, rank, step), so nothing else is needed to go on to the same bits. It
is read by any number of processes, whether the weights are sharded or not.

Unlike a pipeline folder, a checkpoint is trusted: torch pickles its index. Load only those of your own runs.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
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

from tokenizer.files import PipelineLoadError, fsync, read_json, temporary_name, write_json

from ..config import UserError

Tensors = dict[str, Tensor]
FORMAT_VERSION = 1
RECORD, BEST, TENSORS = "state.json", "best.safetensors", "tensors"
NAME = re.compile(r"step-\d{8,}")
LEFTOVER = re.compile(r"\.(tmp|del)-(step-\d{8,}|tokenizer|pipeline|\w+\.jsonl?|\w+-\d{8}\.png)-[0-9a-f]{8}(\.\w+)?")
"""What a killed process may leave: of a checkpoint, a snapshot, a file of the run, a preview."""


# Which checkpoints there are -----------------------------------------------------------------------


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first. Raises `OSError` where the folder cannot be read."""
    try:
        names = os.listdir(run / "state")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((run / "state" / name for name in names if NAME.fullmatch(name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def read_newest_record(run: Path) -> dict[str, Any]:
    """Return the counters of the newest checkpoint whose record can be read, without its tensors; {} if there is
    none."""
    for checkpoint in reversed(list_checkpoints(run)):
        try:
            return read_json(checkpoint / RECORD)
        except PipelineLoadError:  # loading it will say what is wrong
            continue
    return {}


def remove_leftovers(run: Path) -> None:
    """Delete what killed processes left half-written in a run folder; a snapshot that was being replaced gets its name
    back."""
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
    """Return every tensor of a checkpoint by its name: `model.*`, `average.*`, and `optimizer.<player>/<parameter>/*`.

    Not by torch's `get_optimizer_state_dict`, which takes a step with a learning rate of 0 to fill the state of a
    parameter that has had no gradient yet: Adam would then count a step that was never taken.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for player, optimizer in optimizers.items():
        for parameter, moments in optimizer.state.items():
            for key, value in moments.items():
                tensors[f"optimizer.{player}/{names[parameter]}/{key}"] = value
    return tensors


def copy_to_cpu(tensors: Tensors) -> Tensors:
    """Return copies that training does not change."""
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def is_finite(tensors: Tensors) -> bool:
    """Return whether all numbers that this process holds are finite."""
    local = [value.to_local() if isinstance(value, DTensor) else value for value in tensors.values()]
    return all(bool(torch.isfinite(value).all()) for value in local if value.is_floating_point())


def write_checkpoint(
    run: Path, step: int, tensors: Tensors, record: dict[str, Any], best: Tensors | None, *, main: bool, sharded: bool
) -> None:
    """Write `<run>/state/step-<step>` atomically, then delete all checkpoints but the two newest.

    sharded: every process calls this, and writes its pieces; otherwise the main process alone does. best: the best of
    the averaged weights, whole, on the main process. Raises `OSError`.
    """
    target = run / "state" / f"step-{step:08d}"
    temporary = temporary_name(target)
    if sharded:
        agreed = [temporary]
        torch.distributed.broadcast_object_list(agreed)
        temporary = agreed[0]
    try:  # whatever fails on one process before it saves would leave the others waiting: `dcp.save` makes the folder
        writer = dcp.FileSystemWriter(temporary / TENSORS, sync_files=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process saves alone, which it is to do
            dcp.save(tensors, storage_writer=writer, no_dist=not sharded)
        if main:
            if best is not None:
                save_file({name: value.contiguous() for name, value in best.items()}, temporary / BEST)
                fsync(temporary / BEST)
            write_json(temporary / RECORD, {"format_version": FORMAT_VERSION, "step": step, **record})
            for path in (temporary / RECORD, temporary / TENSORS, temporary):
                fsync(path)
            if target.exists():  # a damaged one, which was passed over
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
    """Delete a checkpoint; a kill meanwhile does not leave half of it under its name."""
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
) -> tuple[dict[str, Any], Tensors | None]:
    """Load the newest of a run's checkpoints, oldest first, that can be loaded into these objects; return its record,
    and its best weights, if any.

    Returns ({}, None) where there is none. One that cannot be loaded is skipped with a warning. checkpoints: the same
    on all processes. all_agree: whether a bool is true on all of them. Raises `UserError` where there are checkpoints
    and none can be loaded.
    """
    for checkpoint in reversed(checkpoints):
        error: BaseException | None = None
        try:
            record = read_json(checkpoint / RECORD)
            if record.get("format_version") != FORMAT_VERSION or record.get("step") != step_of(checkpoint):
                raise ValueError(f"{RECORD} is not that of step {step_of(checkpoint)}, or of another version")
            best = load_file(checkpoint / BEST) if record.get("best") else None
            if best is not None:
                require_same_shapes(best, average)
            load_tensors(checkpoint / TENSORS, model, average, optimizers)
        # A damaged file may raise anything (torch's own error is no `Exception`), and an older one may be whole.
        except (Exception, dcp.CheckpointException) as caught:
            error = caught
        if all_agree(error is None):
            return record, best
        if error is not None:
            print(f"warning: {checkpoint} is passed over: {_first_line(error)}", file=sys.stderr, flush=True)
    if checkpoints:
        raise UserError(
            f"{checkpoints[0].parent}: none of its {len(checkpoints)} checkpoints can be loaded; nothing was changed. "
            f"To train from the beginning, choose another out=, or delete {checkpoints[0].parent.parent}"
        )
    return {}, None


def require_same_shapes(tensors: Tensors, model: nn.Module) -> None:
    """Raise `ValueError` unless these are tensors of the model."""
    found, expected = ({name: value.shape for name, value in each.items()} for each in (tensors, model.state_dict()))
    if found != expected:
        differing = min(name for name, _ in found.items() ^ expected.items())
        raise ValueError(f"{BEST}: {differing} has shape {found.get(differing)}, expected {expected.get(differing)}")


def load_tensors(folder: Path, model: nn.Module, average: nn.Module, optimizers: Mapping[str, Optimizer]) -> None:
    """Load what `collect_tensors` returned. Raises `ValueError` for a tensor that is missing, superfluous, or of
    another shape, and whatever torch raises for files that are damaged."""
    reader = dcp.FileSystemReader(folder)
    found: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = collect_tensors(model, average, {})
    parameters = dict(model.named_parameters())
    moments: dict[str, tuple[Optimizer, nn.Parameter, str]] = {}
    for key, stored in found.items():
        if not key.startswith("optimizer."):
            continue
        player, name, entry = key.removeprefix("optimizer.").split("/")
        parameter = parameters[name]
        if stored.size == parameter.shape:
            tensors[key] = torch.empty_like(parameter, dtype=stored.properties.dtype, requires_grad=False)
        else:  # a count of steps
            tensors[key] = torch.empty(stored.size, dtype=stored.properties.dtype, device=parameter.device)
        moments[key] = optimizers[player], parameter, entry
    if differing := sorted(set(found) ^ set(tensors)):
        raise ValueError(f"{differing[0]} is {'not expected' if differing[0] in found else 'missing'}")
    for key, value in tensors.items():
        if found[key].size != value.shape:
            raise ValueError(f"{key} has shape {list(found[key].size)}, expected {list(value.shape)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that each process reads alone, which it is to do
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    for optimizer in optimizers.values():
        optimizer.state.clear()  # of a newer checkpoint, which another process could not load
    for key, (optimizer, parameter, entry) in moments.items():
        optimizer.state[parameter][entry] = tensors[key]


def _first_line(error: BaseException) -> str:
    """Return the kind of an error and its first line; of torch's, those of what it was caused by."""
    if isinstance(error, dcp.CheckpointException):
        error = min(error.failures.items())[1][0]
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
