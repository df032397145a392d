"""Untrusted safetensors files: the header is read first and checked against what the model expects; then tensors are
read one at a time, so that loading needs the memory of the model and of its largest tensor.

The format: 8 bytes, the length n of the header, little-endian; n bytes, the header {name: {"dtype", "shape",
"data_offsets"}}; the tensors.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import ConfigError, FormatError, LimitError, PipelineLoadError, WeightsError, shown
from .json_text import parse_json
from .opening import ReadOnce

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS, MAX_AXES = 10_000, 6
MAX_PARAMETERS = 4_000_000_000
MAX_TABLE_BYTES = 1 << 27  # of tensors computed from the configuration, such as masks
MAX_CALLS = 50_000  # of torch functions, to build a model
LARGEST_CODE = 1e4
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "BOOL": torch.bool,
}


class Entry(NamedTuple):
    """A tensor's type and shape, and its place in the bytes after the header: from `begin` up to `end`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file. Raises `OSError`, also where safetensors has an error of its own: for a full disk."""
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def read_header(read: Callable[[int], bytes], size: int, path: Path) -> dict[str, Entry]:
    """The tensors of the file `path` of `size` bytes, in the order of their places. `read(n)` returns the next n bytes.
    Raises `LimitError` for a header that is too large, `WeightsError` for a wrong one."""
    length = int.from_bytes(read(8), "little") if size >= 8 else 0
    if length > MAX_HEADER_BYTES:
        raise LimitError(f"{path}: not safetensors, or its header is larger than {MAX_HEADER_BYTES} bytes")
    if not 2 <= length <= size - 8:
        raise WeightsError(f"{path}: not a readable safetensors file ({size} bytes, with a header of {length})")
    try:
        header = parse_json(read(length), path, keys=5 * MAX_TENSORS)
    except FormatError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise WeightsError(f"{path}: not a readable safetensors file (its header is {reason})") from error
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise LimitError(f"{path}: {len(header)} tensors, at most {MAX_TENSORS} allowed")
    entries = {name: _entry(name, fields, path) for name, fields in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for name, entry in entries.items():
        if entry.begin != position:
            raise WeightsError(f"{path}: {shown(name)} begins at byte {entry.begin}, expected {position}")
        position = entry.end
    if position != size - 8 - length:
        raise WeightsError(f"{path}: {size - 8 - length} bytes of tensors, the header says {position}")
    return entries


def _entry(name: str, fields: Any, path: Path) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{path}: {shown(name)} should have dtype, shape and data_offsets, found {shown(fields)}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise WeightsError(f"{path}: {shown(name)} has type {shown(dtype)}; there are {', '.join(TYPES)}")
    lists = [value if isinstance(value, list) else [None] for value in (shape, offsets)]
    if any(type(item) is not int or item < 0 for value in lists for item in value):
        raise WeightsError(f"{path}: {shown(name)} has shape {shown(shape)} at bytes {shown(offsets)}")
    if len(shape) > MAX_AXES or len(offsets) != 2:
        raise WeightsError(f"{path}: {shown(name)} has {len(shape)} axes, at most {MAX_AXES} are allowed")
    if offsets[1] - offsets[0] != math.prod(shape) * TYPES[dtype].itemsize:
        raise WeightsError(f"{path}: {shown(name)} has {offsets[1] - offsets[0]} bytes for shape {shown(shape)}")
    return Entry(TYPES[dtype], tuple(shape), *offsets)


def tensor_of(raw: Tensor, entry: Entry) -> Tensor:
    """The tensor of the bytes `raw`, uint8 `(n,)`; a view of them if they are aligned."""
    if raw.storage_offset() % entry.dtype.itemsize:
        raw = raw.clone()
    return raw.view(entry.dtype).reshape(entry.shape)


# A model's weights


class _Outline(TorchFunctionMode):
    """Puts all tensors on the meta device, also those that ask for another; skips initialisation; limits the number of
    calls."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise LimitError("asks for more layers than a model may have")
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def expected_weights(build: Callable[[], nn.Module], path: Path) -> dict[str, Tensor]:
    """The weights of the model that `build` makes, on the meta device: no memory of its size is allocated.

    path: the file of its configuration. Raises `ConfigError` for sizes that are each allowed but do not fit together,
    `LimitError` for a model that is too large.
    """
    try:
        with torch.device("meta"), _Outline():
            model = build()
    except PipelineLoadError as error:
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:  # a model need not expect untrusted settings, so it may raise anything
        raise ConfigError(f"{path}: no model has this configuration ({error})") from error
    weights = model.state_dict()
    if sum(value.numel() for value in weights.values()) > MAX_PARAMETERS:
        raise LimitError(f"{path}: asks for more than {MAX_PARAMETERS} parameters")
    tables = sum(value.nbytes for name, value in model.named_buffers() if name not in weights)
    if tables > MAX_TABLE_BYTES:
        raise LimitError(f"{path}: asks for tables of {tables} bytes, at most {MAX_TABLE_BYTES} allowed")
    return weights


def check_header(found: Mapping[str, Entry], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise `WeightsError` unless the file has exactly the expected tensors, in their shape and type; floating-point
    types may differ."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise WeightsError(f"{path}: missing weights {shown(missing[:5])}, unexpected weights {shown(extra[:5])}")
    for key, value in expected.items():
        dtype, shape = found[key].dtype, found[key].shape
        if shape != tuple(value.shape):
            raise WeightsError(f"{path}: {key} has shape {list(shape)}, expected {list(value.shape)}")
        if dtype != value.dtype and not (dtype.is_floating_point and value.is_floating_point()):
            raise WeightsError(f"{path}: {key} has type {dtype}, expected {value.dtype}")


@torch.no_grad()
def fill(model: nn.Module, file: ReadOnce, entries: Mapping[str, Entry]) -> None:
    """Read the tensors of `file`, whose header was read, into `model`. Raises `WeightsError` for a value that is not
    finite, or too large for a code."""
    weights = model.state_dict()
    for name, entry in entries.items():
        raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        file.read_into(raw.numpy().data)
        target = weights[name].copy_(tensor_of(raw, entry))
        if target.is_floating_point() and target.numel():
            low, high = (float(value) for value in target.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise WeightsError(f"{file.path}: {name} holds a value that is not finite")
            if name.endswith("codebook") and max(-low, high) >= LARGEST_CODE:
                raise WeightsError(f"{file.path}: {name} holds {max(-low, high):g}, codes are below {LARGEST_CODE:g}")
