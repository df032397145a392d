"""Tensors that lie in pieces on several processes, as safetensors files: one a process, readable by any number of them.

The files are those of `torch.distributed.checkpoint`: each holds the pieces of its process, and where they belong.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tokenizer.files import PipelineLoadError, WeightsError

Tensors = dict[str, Tensor]
Like = Callable[[str], Tensor | None]
"""From the name of a tensor to one that it is to be laid out like, if there is one of its shape."""

UNREADABLE = (SafetensorError, OSError, KeyError, IndexError, ValueError, TypeError, RuntimeError, AssertionError)


def is_sharded(tensors: Tensors) -> bool:
    """Whether any of them lies in pieces."""
    return any(isinstance(value, DTensor) for value in tensors.values())


def piece(tensor: Tensor) -> Tensor:
    """What this process holds of it: all, where it is not in pieces."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, from all processes, which have to call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather(source: nn.Module, target: nn.Module | None) -> None:
    """Put the weights of `source`, of which each process holds a piece, whole into `target`, where one is given. One
    tensor at a time; all processes have to call this together."""
    places = {} if target is None else target.state_dict()
    for name, value in source.state_dict().items():
        complete = whole(value)
        if target is not None:
            places[name].copy_(complete)


@contextmanager
def agreed(together: bool = True) -> Iterator[None]:
    """A block that fails on one process fails on all, with the same message and an error of the same kind (`OSError` or
    `WeightsError`). If not `together`, it fails alone."""
    error: Exception | None = None
    try:
        yield
    except (OSError, SafetensorError, PipelineLoadError) as caught:
        error = caught
    found: list[Any] = [None]
    if together:
        found = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, error and (isinstance(error, PipelineLoadError), str(error)))
    if error is not None:
        raise error
    for rank, failure in enumerate(found):
        if failure is not None:
            raise (WeightsError if failure[0] else OSError)(f"process {rank}: {failure[1]}")


def write_shards(folder: Path, tensors: Tensors) -> None:
    """Write them below `folder`, each process its pieces; all have to call this together. Raises `OSError` on all
    processes, naming one on which the disk is full or gone."""
    from torch.distributed.checkpoint import (
        CheckpointException,
        DefaultSavePlanner,
        HuggingFaceStorageWriter,
        save,
    )

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        # The first process writes what all have (counts of steps), or a resumed run's files would hold other tensors.
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        save(tensors, storage_writer=writer, planner=planner)
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        raise OSError(f"process {rank}: {error}") from failed


def read_shards(folder: Path, like: Like) -> Tensors:
    """Every tensor below `folder`, whatever number of processes wrote it: in pieces where `like` is, whole elsewhere.

    Each process reads for itself. Raises `WeightsError` for files that are damaged, or a tensor of which a piece is
    missing.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

    try:
        reader = HuggingFaceStorageReader(str(folder))
        tensors: Tensors = {}
        pieces: dict[str, Any] = reader.read_metadata().state_dict_metadata
        for name, found in pieces.items():
            if sum(chunk.sizes.numel() for chunk in found.chunks) != found.size.numel():
                raise WeightsError(f"{folder}: pieces of {name} are missing")
            model, dtype = like(name), found.properties.dtype
            if isinstance(model, DTensor) and model.shape == found.size:
                tensors[name] = torch.empty_like(model, dtype=dtype)
            else:
                tensors[name] = torch.empty(found.size, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it reads alone, which it is to do
            load(tensors, storage_reader=reader, no_dist=True)
        return tensors
    except WeightsError:
        raise
    except (*UNREADABLE, CheckpointException) as error:
        raise WeightsError(f"{folder}: not readable shards ({error})") from error


def read_whole(path: Path, like: Like) -> Tensors:
    """Every tensor of one safetensors file, of which each process takes its piece where `like` is in pieces. Raises
    `WeightsError` for a damaged file."""
    tensors: Tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                value, model = file.get_tensor(name), like(name)
                if isinstance(model, DTensor) and model.shape == value.shape:
                    value = distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)
                tensors[name] = value
        return tensors
    except UNREADABLE as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error
