"""The formats of a recorded program: how it is written, and how it is run again, by what reads it elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .tracing import NAMES, ExportError, Part, first_line, quiet

Format = Literal["onnx", "torch"]
Run = Callable[[Tensor], Tensor]
INSIDE = 1 << 30  # bytes of weights that lie in an .onnx file itself; protobuf ends at 2 GiB


class FileFormat(NamedTuple):
    """`write(program, part, path)`, and `load(path)`, which gives a function of one tensor. needs: packages."""

    suffix: str
    write: Callable[[ExportedProgram, Part, Path], None]
    load: Callable[[Path], Run]
    needs: tuple[str, ...] = ()


def write_onnx(program: ExportedProgram, part: Part, path: Path) -> None:
    """An ONNX file whose first axes are called `batch`; large weights lie beside it in `<name>.data`. Raises
    `ExportError`."""
    given, made = NAMES[part]
    sizes = [tensor.nbytes for tensor in program.state_dict.values()]
    try:
        with quiet():
            written = torch.onnx.export(
                program, dynamo=True, input_names=[given], output_names=[made], verbose=False, optimize=True
            )
            assert written is not None
            name_batch(written.model)
            written.save(str(path), external_data=sum(sizes) > INSIDE)
    except Exception as error:  # of many kinds: a missing operation is one of onnxscript's
        raise ExportError(f"ONNX cannot say what its {part} does: {first_line(error)}") from error


def name_batch(model: Any) -> None:
    """Call the axis of images `batch`, in what comes in and what goes out."""
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs):
        value.shape[0] = "batch"


def load_onnx(path: Path) -> Run:
    """Run by onnxruntime, on the CPU. Raises `ExportError` for what it does not run: weights of some types."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # of many kinds, all of onnxruntime
        raise ExportError(f"onnxruntime does not run its {path.stem}: {first_line(error)}") from error
    name = session.get_inputs()[0].name
    return lambda given: torch.from_numpy(session.run(None, {name: given.numpy()})[0])


def write_torch(program: ExportedProgram, part: Part, path: Path) -> None:
    """A `.pt2` archive, which `torch.export.load` reads, and AOTInductor compiles."""
    with quiet():
        torch.export.save(program, path)


def load_torch(path: Path) -> Run:
    """Run by torch."""
    with quiet():
        module = torch.export.load(path).module()
    return lambda given: module(given)


FORMATS: dict[Format, FileFormat] = {
    "onnx": FileFormat(".onnx", write_onnx, load_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch": FileFormat(".pt2", write_torch, load_torch),
}


def require_installed(name: Format) -> None:
    """Raise `ExportError` for a format that there is not, or that needs a package which is not there."""
    if name not in FORMATS:
        raise ExportError(f"format: there are {' and '.join(FORMATS)} (got {name!r})")
    if missing := [package for package in FORMATS[name].needs if find_spec(package) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise ExportError(f'{" and ".join(missing)} {verb} not installed: pip install "smalti[export]"')
