"""An optimizer's state as tensors, under `<parameter index>.<name>`, and everything else as JSON; and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tokenizer.files import WeightsError

Tensors = dict[str, Tensor]
OF_THE_STEP = {"params", "lr", "bf16"}
OF_THE_MACHINE = {"foreach", "fused", "capturable", "differentiable"}
"""Settings that may differ in a state from those of the run that goes on with it, and those that are never taken from
there: how this machine computes a step."""


def pack_optimizer(optimizer: Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of its state, and a JSON object of all else."""
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


def unpack_optimizer(path: Path, tensors: Tensors, document: dict[str, Any], optimizer: Optimizer) -> None:
    """Load what `pack_optimizer` returned into an optimizer of the same kind over the same parameters.

    Moments are laid out, and lie in pieces, as their parameters do. Raises `WeightsError` with `path` and what differs.
    """
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
            if name == "step" and not 0 <= float(value) < 2**53:
                raise ValueError(f"{key} is {float(value)}, expected a count of steps")
            if index != "group" and "." not in name:  # what lies deeper is in the document's places
                state.setdefault(int(index), {})[name] = _laid_out_like(value, parameters[int(index)])
        groups = _from_json(document["param_groups"], tensors)
        _fit_settings(groups, optimizer.param_groups)
        _require_moments(optimizer, state)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        _restore_dtypes(optimizer, parameters, state)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: not a state of this optimizer ({type(error).__name__}: {error})") from error


def _fit_settings(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Raise `ValueError` for settings of another run: torch would take any, and fail at the next step. Those of the
    machine are put in."""
    first = 0
    for group, ours in zip(found, expected, strict=True):
        places = list(range(first, first := first + len(ours["params"])))
        if group["params"] != places:
            raise ValueError(f"params are {group['params']!r:.80}, expected {places!r:.80}")
        group |= {name: ours[name] for name in OF_THE_MACHINE & set(ours)}
        for name, value in ours.items():
            alike = type(group[name]) is type(value) or {type(group[name]), type(value)} <= {int, float}
            if not alike or (name not in OF_THE_STEP and group[name] != value):
                raise ValueError(f"{name} is {group[name]!r:.80}, this run's is {value!r:.80}")


def _require_moments(optimizer: Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """Raise `ValueError` for a parameter with more or less than its kind of optimizer keeps: Adam would fail at the
    next step, and Muon begin anew. A parameter that never had a gradient has none of it."""
    if not isinstance(getattr(optimizer, "optimizer", optimizer), (torch.optim.Adam, torch.optim.AdamW)):
        return
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    for index, entry in state.items():
        moments = {"exp_avg", "exp_avg_sq", "step"} | ({"max_exp_avg_sq"} if groups[index].get("amsgrad") else set())
        expected = {"momentum"} if "momentum" in groups[index] else moments  # of our Muon
        if entry and set(entry) != expected:
            raise ValueError(f"parameter {index} has {sorted(entry)!r:.80}, expected {sorted(expected)}")


def parameter_of(optimizer: Optimizer, key: str) -> Tensor | None:
    """The parameter that the tensor `key` of a packed state belongs to, if to any."""
    index, parameters = key.partition(".")[0], _parameters(optimizer)
    return parameters[int(index)] if index.isdecimal() and int(index) < len(parameters) else None


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
    """A copy of `value`, with the strides of `parameter` (channels_last, say), which a fused kernel relies on. Raises
    `ValueError` for another shape than its, and for a type that is neither its own nor float32."""
    if value.dtype not in (parameter.dtype, torch.float32):
        raise ValueError(f"a tensor of type {value.dtype}, its parameter has {parameter.dtype}")
    if value.shape != parameter.shape and value.numel() == 1:
        return value.clone()  # such as a count of steps
    if value.shape != parameter.shape:
        raise ValueError(f"a tensor of shape {list(value.shape)}, its parameter has {list(parameter.shape)}")
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
