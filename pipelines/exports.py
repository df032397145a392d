"""Export of tokenizers to ONNX or `torch.export` programs, each checked by running it.

A tokenizer becomes two programs with a dynamic batch size: the encoder, images to tokens, and the decoder, tokens to
images. A traced program has no data-dependent control flow. Therefore it does not check ids, does not split rows into
blocks (which does not change results), and compares values with every edge instead of searching.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from tokenizer import TokenGrid, Tokenizer
from tokenizer.base import grid_to_dict
from tokenizer.files import FolderKind, atomic_folder, write_json, write_manifest
from tokenizer.spec import to_float

Format = Literal["onnx", "torch"]
ProgramPart = Literal["encoder", "decoder"]
Run = Callable[[Tensor], Tensor]

EXPORT_SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
IO_NAMES: dict[ProgramPart, tuple[str, str]] = {"encoder": ("images", "tokens"), "decoder": ("tokens", "images")}
"""The names of each part's input and output."""
FACTS, FORMAT_VERSION = "export.json", 1
EXPORT = FolderKind("an exported tokenizer", FACTS, lambda facts: facts.get("_class_name") == "ExportedTokenizer")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INSIDE = 1 << 30  # maximum bytes of weights inside an .onnx file; protobuf is limited to 2 GiB
RANDOM = 8  # number of noise images for the check
PIXEL_TOLERANCE = 1e-4  # for pixels in [-1, 1], where a grey level is 0.008
NEARBY = 2**-18  # perturbation of images, relative to their range, that reveals near-ties


class ExportError(ValueError):
    """The tokenizer cannot be exported, or the exported file gives other results; the message is one line."""


class Checked(NamedTuple):
    """The result of a comparison: number of images, number of tokens, number of tokens that differ (`close_calls`), and
    largest difference between pixels."""

    images: int
    tokens: int
    close_calls: int
    pixel_difference: float


def export_tokenizer(tokenizer: Tokenizer, folder: str | Path, format: Format, images: Tensor | None = None) -> Checked:
    """Write `tokenizer` as `encoder.onnx` and `decoder.onnx` (or `.pt2`), atomically, check the files by running them,
    and return the comparison.

    images: float `(B, C, H, W)` in [-1, 1], checked in addition to noise images. Raises `ExportError` if the tokenizer
    cannot be traced, a package is missing or a file gives other results; `PathError` if the folder holds something
    else; `ValueError` for images of another size or type.
    """
    require_format(format)
    if tokenizer.spec.frames > 1:
        raise ExportError("a tokenizer of clips cannot be exported; export that of its frames, `tokenizer.tokenizer`")
    tokenizer = copy.deepcopy(tokenizer).cpu().eval()  # do not move the caller's model
    example = make_noise(tokenizer.image_shape)  # not the user's images: a .pt2 file contains its example inputs
    with torch.no_grad():
        examples: dict[ProgramPart, Tensor] = {"encoder": example, "decoder": tokenizer.encode(example)}
    if images is not None:
        tokenizer.spec.check(images)
    some = example if images is None else torch.cat([example, images.to(example)])
    with atomic_folder(folder, kind=EXPORT) as target:
        paths = {part: target / f"{part}{EXPORT_SUFFIXES[format]}" for part in IO_NAMES}
        for part, path in paths.items():
            write_program(trace_part(tokenizer, part, examples[part]), part, path)
        compared = compare_outputs(tokenizer, load_program(paths["encoder"]), load_program(paths["decoder"]), some)
        write_json(target / FACTS, describe_export(tokenizer, format, compared))
        write_manifest(target)
    return compared


def require_format(format: Format) -> None:
    if format not in EXPORT_SUFFIXES:
        raise ExportError(f"format should be {' or '.join(EXPORT_SUFFIXES)} (got {format!r})")
    if format == "onnx" and (missing := [package for package in ONNX_PACKAGES if find_spec(package) is None]):
        raise ExportError(f'not installed: {", ".join(missing)}; pip install "smalti[export]"')


def make_noise(shape: tuple[int, ...]) -> Tensor:
    """Return images of 8-bit noise, `(RANDOM, C, H, W)` in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    return to_float(torch.randint(256, (RANDOM, *shape), generator=generator, dtype=torch.uint8))


def describe_export(tokenizer: Tokenizer, format: Format, compared: Checked) -> dict[str, Any]:
    """Return the content of `export.json`: the inputs and outputs of each file, and the result of the check."""
    channels, height, width = tokenizer.image_shape
    grid = tokenizer.grid
    forms = {
        "images": {"type": "float32", "shape": ["batch", channels, height, width], "range": [-1, 1]},
        "tokens": {"type": "int64", "shape": ["batch", *grid.shape], "range": [0, grid.vocab_size - 1]},
    }
    parts: dict[str, Any] = {
        part: {
            "file": f"{part}{EXPORT_SUFFIXES[format]}",
            "takes": {"name": given, **forms[given]},
            "gives": {"name": made, **forms[made]},
        }
        for part, (given, made) in IO_NAMES.items()
    }
    return {
        "_class_name": "ExportedTokenizer",
        "format_version": FORMAT_VERSION,
        "format": format,
        "tokenizer": tokenizer.name,
        "fingerprint": tokenizer.fingerprint(),
        "image_size": [height, width],
        "channels": channels,
        "grid": grid_to_dict(grid),
        **parts,
        "checked": {**compared._asdict(), "tolerance": PIXEL_TOLERANCE},
    }


# Tracing


class UncheckedGrid(TokenGrid):
    """A grid that does not check ids, since a check is data-dependent control flow."""

    def check(self, tokens: Tensor) -> None:
        pass


class TraceableOps(TorchFunctionMode):
    """Replace operations that cannot be traced or exported by equivalents."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.split and is_block(*args, **kwargs):
            return (args[0],)
        if func is torch.searchsorted and kwargs == {"right": True}:
            edges, values = args
            return (edges.unsqueeze(-2) <= values.unsqueeze(-1)).sum(-1)  # ONNX has no searchsorted
        return func(*args, **kwargs)


def is_block(rows: Tensor, size: Any, dim: int = 0) -> bool:
    """Return whether this call of `split` splits a dynamic number of rows into blocks."""
    return dim == 0 and isinstance(size, int) and isinstance(rows.shape[0], torch.SymInt)


class Program(nn.Module):
    """One part of a tokenizer as a module."""

    def __init__(self, tokenizer: Tokenizer, part: ProgramPart) -> None:
        super().__init__()
        self.tokenizer, self.part = copy.deepcopy(tokenizer), part
        for module in self.tokenizer.modules():
            if isinstance(grid := vars(module).get("grid"), TokenGrid):
                vars(module)["grid"] = UncheckedGrid(**{each.name: getattr(grid, each.name) for each in fields(grid)})

    def forward(self, given: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` in [-1, 1] to tokens `(B, *grid.shape)`, or tokens to images."""
        with TraceableOps():
            return self.tokenizer.encode(given) if self.part == "encoder" else self.tokenizer.decode(given)


def trace_part(tokenizer: Tokenizer, part: ProgramPart, example: Tensor) -> ExportedProgram:
    """Trace a part on `example`, a batch of at least two inputs. Raises `ExportError` if the model cannot be traced."""
    try:
        with silence_exporters(), torch.no_grad():
            program = torch.export.export(
                Program(tokenizer, part).eval(), (example,), dynamic_shapes=({0: Dim.DYNAMIC},)
            )
            drop_unused(program)
            for module in program.graph_module.modules():
                for node in module.graph.nodes if isinstance(module, GraphModule) else ():
                    node.meta.pop("stack_trace", None)  # paths of this machine
            return program
    except Exception as error:  # the type depends on the model
        raise ExportError(f"the {part} of this {tokenizer.name} cannot be traced: {summarize_error(error)}") from error


def drop_unused(program: ExportedProgram) -> None:
    """Remove the weights of the other part from the program."""
    program.graph.eliminate_dead_code()
    specs = program.graph_signature.input_specs
    for node in [node for node in program.graph.nodes if node.op == "placeholder" and not node.users]:
        spec = next(spec for spec in specs if spec.arg.name == node.name)
        if spec.target is not None:
            specs.remove(spec)
            program.graph.erase_node(node)
            program.state_dict.pop(spec.target, None)
            program.constants.pop(spec.target, None)
    program.graph_module.recompile()


@contextmanager
def silence_exporters() -> Iterator[None]:
    """Suppress the log messages and warnings of exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def summarize_error(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no reason given'])[0][:200]}"


# Files


def write_program(program: ExportedProgram, part: ProgramPart, path: Path) -> None:
    """Write a `.pt2` archive, which `torch.export.load` reads and AOTInductor compiles; or an ONNX file whose first
    axes are called `batch`, with large weights beside it in `<name>.data`. Raises `ExportError`."""
    if path.suffix == ".pt2":
        with silence_exporters():
            torch.export.save(program, path)
        return
    given, made = IO_NAMES[part]
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    try:
        with silence_exporters():
            written = torch.onnx.export(
                program, dynamo=True, input_names=[given], output_names=[made], verbose=False, optimize=True
            )
            assert written is not None
            for value in (*written.model.graph.inputs, *written.model.graph.outputs):
                shape: Any = value.shape
                shape[0] = "batch"
            written.save(str(path), external_data=size > INSIDE)
    except Exception as error:  # many types are possible, including onnxscript's for unsupported operations
        raise ExportError(f"ONNX cannot express the {part}: {summarize_error(error)}") from error


def load_program(path: Path) -> Run:
    """Load a file to run with torch, or with onnxruntime on the CPU. Raises `ExportError` if onnxruntime cannot run it,
    for example because of the type of its weights."""
    if path.suffix == ".pt2":
        with silence_exporters():
            module = torch.export.load(path).module()
        return lambda given: module(given)
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has many error types
        raise ExportError(f"onnxruntime cannot run the {path.stem}: {summarize_error(error)}") from error
    name = session.get_inputs()[0].name
    return lambda given: torch.from_numpy(session.run(None, {name: given.numpy()})[0])


# Checks


@torch.no_grad()
def compare_outputs(tokenizer: Tokenizer, encode: Run, decode: Run, images: Tensor) -> Checked:
    """Compare a file's `encode` and `decode` with the tokenizer's on `images` (B, C, H, W) in [-1, 1], one at a time
    and in one batch.

    All tokens must be equal, except close calls, where the tokenizer itself returns another id if the image is
    perturbed within float32 rounding. Pixels must agree to within `PIXEL_TOLERANCE`. Raises `ExportError` otherwise.
    """
    expected = tokenizer.encode(images)
    pixels = tokenizer.decode(expected)
    close, difference = 0, 0.0
    for size in sorted({1, len(images)}):
        found = torch.cat([encode(part.contiguous()) for part in images.split(size)])
        decoded = torch.cat([decode(part.contiguous()) for part in expected.split(size)])
        for name, one, other in (("encoder", found, expected), ("decoder", decoded, pixels)):
            if (one.dtype, one.shape) != (other.dtype, other.shape):
                forms = [f"{each.dtype} of shape {tuple(each.shape)}" for each in (one, other)]
                raise ExportError(f"the exported {name} returns {forms[0]}, but the tokenizer returns {forms[1]}")
        differs = found != expected
        if bool(differs.any()) and (wrong := int((differs & ~find_close_calls(tokenizer, images, expected)).sum())):
            raise ExportError(
                f"{wrong:,} of {expected.numel():,} ids of the exported encoder differ from the tokenizer's"
            )
        apart = float((decoded - pixels).abs().max())
        if not apart <= PIXEL_TOLERANCE:  # also true for NaN
            raise ExportError(f"pixels of the exported decoder differ from the tokenizer's by up to {apart:.2g} of 2")
        close, difference = max(close, int(differs.sum())), max(difference, apart)
    return Checked(len(images), expected.numel(), close, difference)


def find_close_calls(tokenizer: Tokenizer, images: Tensor, tokens: Tensor) -> Tensor:
    """Return which `tokens` change under tiny perturbations of `images`, bool of the same shape."""
    generator = torch.Generator().manual_seed(0)
    close = torch.zeros_like(tokens, dtype=torch.bool)
    for _ in range(8):
        moved = images + NEARBY * (torch.rand(images.shape, generator=generator, dtype=images.dtype) * 2 - 1)
        close |= tokenizer.encode(moved.clamp(-1, 1)) != tokens
    return close
