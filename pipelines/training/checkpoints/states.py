"""Resume states: `<run>/state/step-00001000/`, written whole or not at all, verified before they are trusted.

A state holds the raw model, its average, the best of its averages so far, every player's optimizer and the counters of
the loop, as safetensors and JSON; nothing is pickled. Randomness and data order are functions of the step, so they need
no saving. Where weights lie in pieces on several processes, `model.safetensors` is a folder `model/` with a file from
each; either kind is read by any number of processes, sharded or not.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from tokenizer.files import (
    FolderKind,
    FormatError,
    WeightsError,
    atomic_folder,
    make_folder,
    quote,
    read_json,
    verify_manifest,
    write_json,
    write_manifest,
)

from .optimizers import pack_optimizer, parameter_of, unpack_optimizer
from .rotation import NAME, require_space, rotate
from .sharded import Like, Tensors, agreed, is_sharded, piece, read_shards, read_whole, write_shards

FORMAT_VERSION = 1
MODEL, EMA, BEST, STATE = "model.safetensors", "ema.safetensors", "best.safetensors", "state.json"
STATE_FILES = re.compile(
    r"(model|ema|optimizer-\w+)(\.safetensors|/[\w.-]+)|best\.safetensors|optimizer-\w+\.json|state\.json"
    r"|manifest\.json"
)
STATE_FOLDER = FolderKind("a resume state", None, may_hold=lambda name: STATE_FILES.fullmatch(name) is not None)
"""Known by its files, whatever is in them: a damaged one is replaced, too."""


def save_state(run: Path, step: int, **what: Any) -> Path:
    """Write `<run>/state/step-<step>` atomically, then delete all but the newest `keep` states; return the folder. What
    a state is made of, and what is raised: as in `prepare_state`."""
    return prepare_state(run, step, **what)()


def prepare_state(
    run: Path,
    step: int,
    *,
    model: nn.Module,
    ema: nn.Module | None,
    optimizers: Mapping[str, Optimizer],
    counters: dict[str, Any],
    config: dict[str, Any] | None = None,
    best: Tensors | None = None,
    keep: int = 2,
) -> Callable[[], Path]:
    """The first half of `save_state`, which looks at all of it and takes copies, on the CPU; returns the second, which
    writes these, while training goes on. Of sharded weights no copy is taken: they are to be written at once.

    `model` and `ema` are the unwrapped modules; `counters` is any JSON object; `config` is that of the run, by which
    its states are known; `best` are the best of the averaged weights so far, whole. Call it on the main process only;
    where weights are sharded, on all processes, each of which writes its pieces (the main one `best`, too), and raises
    what one of them raises.
    Raises `WeightsError` naming a tensor that is not finite, and `OSError` (ENOSPC) naming path, needed and free bytes
    if the disk is too full; older states are untouched in both cases.
    """
    parts: dict[str, Tensors] = {MODEL: model.state_dict()}
    if ema is not None:
        parts[EMA] = ema.state_dict()
    state = {"format_version": FORMAT_VERSION, "step": step, "counters": counters, "config": config}
    documents: dict[str, dict[str, Any]] = {STATE: state}
    for player, optimizer in optimizers.items():
        tensors, document = pack_optimizer(optimizer)
        parts[f"optimizer-{player}.safetensors"], documents[f"optimizer-{player}.json"] = tensors, document
    target = Path(run) / "state" / f"step-{step:08d}"
    if any(is_sharded(tensors) for tensors in parts.values()):
        return partial(_save_together, target, parts, best, documents, keep)
    _prepare(target, parts if best is None else {**parts, BEST: best}, step)
    copies = {name: _detached(tensors) for name, tensors in parts.items()}
    return partial(_save, target, copies, best, copy.deepcopy(documents), keep)


def _save(
    target: Path, parts: dict[str, Tensors], best: Tensors | None, documents: dict[str, dict[str, Any]], keep: int
) -> Path:
    with atomic_folder(target, kind=STATE_FOLDER) as folder:
        for name, tensors in parts.items():
            save_file(tensors, folder / name)
        if best is not None:
            save_file(_detached(best), folder / BEST)
        _complete(folder, documents)
    rotate(target, keep)
    return target


def _save_together(
    target: Path, parts: dict[str, Tensors], best: Tensors | None, documents: dict[str, dict[str, Any]], keep: int
) -> Path:
    """Every process writes its pieces into the folder that the main one makes, completes and renames."""
    main, step = torch.distributed.get_rank() == 0, documents[STATE]["step"]
    places: list[Any] = [None]
    with ExitStack() as stack:
        with agreed():
            _require_finite(parts, step)
            if main:
                _prepare(target, parts if best is None else {**parts, BEST: best}, step)
                places = [stack.enter_context(atomic_folder(target, kind=STATE_FOLDER))]
        torch.distributed.broadcast_object_list(places)
        for name, tensors in parts.items():
            write_shards(places[0] / Path(name).stem, tensors)
        with agreed():
            if main:
                if best is not None:
                    save_file(_detached(best), Path(places[0]) / BEST)
                _complete(places[0], documents)
                stack.close()  # renames it
                rotate(target, keep)
    return target


def _prepare(target: Path, parts: dict[str, Tensors], step: int) -> None:
    """Find out what would go wrong before anything is written."""
    make_folder(target.parent)
    _require_finite(parts, step)
    require_space(target.parent, parts)


def _complete(folder: Path, documents: dict[str, dict[str, Any]]) -> None:
    for name, document in documents.items():
        write_json(folder / name, document)
    write_manifest(folder, step=documents[STATE]["step"])


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
    parts = {f"{Path(name).parts[0]}.safetensors" if "/" in name else name for name in manifest["files"]}
    if parts - {BEST} != expected:
        missing, extra = sorted(expected - parts), sorted(parts - expected)
        raise FormatError(f"{folder}: not a state of this run: missing {missing}, unexpected {extra}")
    _require_listed(folder, manifest["files"])
    state = read_json(folder / STATE)
    step, counters, version = state.get("step"), state.get("counters"), state.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(
            f"{folder / STATE}: format_version: found {quote(version)}, this version reads {FORMAT_VERSION}"
        )
    if type(step) is not int or step != manifest.get("step") or not isinstance(counters, dict):
        raise FormatError(f"{folder / STATE}: expected counters and step {manifest.get('step')}, found step {step!r}")
    if NAME.fullmatch(folder.name) and folder.name != f"step-{step:08d}":
        raise FormatError(f"{folder}: a state of step {step}, which has another name; nothing was changed")
    _load_module(folder / MODEL, model)
    if ema is not None:
        _load_module(folder / EMA, ema)
    for player, optimizer in optimizers.items():
        path = folder / f"optimizer-{player}.safetensors"
        tensors = _read_tensors(path, partial(parameter_of, optimizer))
        unpack_optimizer(path, tensors, read_json(path.with_suffix(".json")), optimizer)
    return step, counters


def _require_listed(folder: Path, listed: Mapping[str, Any]) -> None:
    """Raise `FormatError` for a file that would be read, as all in a folder of shards are, but was not verified."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.safetensors"))]
    if unlisted := [name for name in names if name not in listed]:
        raise FormatError(f"{folder}: {quote(unlisted[0])} is not among the files that its manifest lists")


def load_best(folder: Path, like: nn.Module, expected: bool) -> Tensors | None:
    """The best of the averaged weights in a state, whole, on the CPU; None where none are `expected`. like: the module
    of averages, of which each process may hold a piece. Raises `WeightsError` as `load_state` does, `FormatError`."""
    path = Path(folder) / BEST
    if path.is_file() != expected:
        raise FormatError(
            f"{path}: {'missing' if expected else 'unexpected'}, by what {STATE} says of the best weights"
        )
    if not expected:
        return None
    found = _read_tensors(path, lambda _: None)
    _require_like(path, found, like.state_dict())
    return found


# Tensors


def _detached(tensors: Tensors) -> Tensors:
    """Copies on the CPU: safetensors refuses tied weights, which share memory, and strides."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}


def _read_tensors(path: Path, like: Like) -> Tensors:
    """What is in the file, or in the folder of shards in its place; in pieces where `like` is."""
    return read_whole(path, like) if path.is_file() else read_shards(path.with_suffix(""), like)


def _load_module(path: Path, module: nn.Module) -> None:
    expected = module.state_dict()
    found = _read_tensors(path, expected.get)
    _require_like(path, found, expected)
    module.load_state_dict(found, strict=True)


def _require_like(path: Path, found: Tensors, expected: Tensors) -> None:
    """Raise `WeightsError` unless these are tensors of the names, shapes and types that are expected."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise WeightsError(f"{path}: missing tensors {missing[:5]}, unexpected tensors {extra[:5]}")
    for key, value in expected.items():
        if found[key].shape != value.shape:
            raise WeightsError(f"{path}: {key} has shape {list(found[key].shape)}, expected {list(value.shape)}")
        if found[key].dtype != value.dtype:
            raise WeightsError(f"{path}: {key} has type {found[key].dtype}, expected {value.dtype}")


def _require_finite(parts: dict[str, Tensors], step: int) -> None:
    for file, tensors in parts.items():
        for key, value in tensors.items():
            if (value.is_floating_point() or value.is_complex()) and not bool(torch.isfinite(piece(value)).all()):
                raise WeightsError(f"step {step} is not saved: {key} ({file}) holds a value that is not finite")
