"""Tokenizers as files that other programs run: ONNX, or `torch.export`'s programs, each checked by running it.

A tokenizer becomes two programs for any number of images: the encoder, images to tokens, and the decoder, back. A
program that is recorded cannot look at its input and choose, so three things are different in it: ids are not checked,
rows are not cut into blocks (which changes no result), and edges are compared to one by one.
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
from torch.overrides import TorchFunctionMode

from tokenizer import TokenGrid, Tokenizer
from tokenizer.base import grid_to_dict
from tokenizer.files import FolderKind, atomic_folder, write_json, write_manifest

from .images import to_float

Format = Literal["onnx", "torch"]
Part = Literal["encoder", "decoder"]
Run = Callable[[Tensor], Tensor]

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
NAMES: dict[Part, tuple[str, str]] = {"encoder": ("images", "tokens"), "decoder": ("tokens", "images")}
"""What each part takes and what it gives."""
FACTS, FORMAT_VERSION = "export.json", 1
EXPORT = FolderKind("an exported tokenizer", FACTS, lambda facts: facts.get("_class_name") == "ExportedTokenizer")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INSIDE = 1 << 30  # bytes of weights that lie in an .onnx file itself; protobuf ends at 2 GiB
RANDOM = 8  # images of noise on which a file is checked
TOLERANCE = 1e-4  # of pixels in [-1, 1], in which a grey level is 0.008
NEARBY = 2**-18  # how far images are moved, as a share of their range, to see which choices are close


class ExportError(ValueError):
    """A tokenizer cannot be written as such a file, or the file gives something else; the message says why, in one
    line."""


class Checked(NamedTuple):
    """A comparison: the numbers of images, of tokens, and of tokens that differ (`close_calls`), and the largest
    difference of pixels."""

    images: int
    tokens: int
    close_calls: int
    pixel_difference: float


def export_tokenizer(tokenizer: Tokenizer, folder: str | Path, format: Format, images: Tensor | None = None) -> Checked:
    """Write `tokenizer` as `encoder.onnx` and `decoder.onnx` (or `.pt2`), check the files by running them, and return
    what was compared. The folder appears whole or not at all.

    images: float `(B, C, H, W)` in [-1, 1], on which it is checked beside images of noise. Raises `ExportError` for a
    tokenizer that cannot be recorded, a package that is missing, and a file that gives something else; `PathError` if
    something else is in the folder; `ValueError` for images of another size or type.
    """
    require_installed(format)
    tokenizer = copy.deepcopy(tokenizer).cpu().eval()  # the caller's stays on its device, beside its prior
    example = noise(tokenizer.image_shape)  # and no image of the user's: a .pt2 file holds what it was recorded on
    with torch.no_grad():
        examples: dict[Part, Tensor] = {"encoder": example, "decoder": tokenizer.encode(example)}
    if images is not None:
        tokenizer.check_images(images)
    some = example if images is None else torch.cat([example, images.to(example)])
    with atomic_folder(folder, kind=EXPORT) as target:
        paths = {part: target / f"{part}{SUFFIXES[format]}" for part in NAMES}
        for part, path in paths.items():
            write(trace(tokenizer, part, examples[part]), part, path)
        compared = check(tokenizer, load(paths["encoder"]), load(paths["decoder"]), some)
        write_json(target / FACTS, facts_of(tokenizer, format, compared))
        write_manifest(target)
    return compared


def require_installed(format: Format) -> None:
    """Raise `ExportError` for an unknown format, or one that needs a package which is not there."""
    if format not in SUFFIXES:
        raise ExportError(f"format: there are {' and '.join(SUFFIXES)} (got {format!r})")
    if format == "onnx" and (missing := [package for package in ONNX_PACKAGES if find_spec(package) is None]):
        raise ExportError(f'not installed: {", ".join(missing)}; pip install "smalti[export]"')


def noise(shape: tuple[int, int, int]) -> Tensor:
    """8-bit images in which every pixel is random, `(RANDOM, C, H, W)` in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    return to_float(torch.randint(256, (RANDOM, *shape), generator=generator, dtype=torch.uint8))


def facts_of(tokenizer: Tokenizer, format: Format, compared: Checked) -> dict[str, Any]:
    """What `export.json` says: which file takes and gives what, and how far it was checked."""
    channels, height, width = tokenizer.image_shape
    grid = tokenizer.grid
    forms = {
        "images": {"type": "float32", "shape": ["batch", channels, height, width], "range": [-1, 1]},
        "tokens": {"type": "int64", "shape": ["batch", *grid.shape], "range": [0, grid.vocab_size - 1]},
    }
    parts: dict[str, Any] = {
        part: {
            "file": f"{part}{SUFFIXES[format]}",
            "takes": {"name": given, **forms[given]},
            "gives": {"name": made, **forms[made]},
        }
        for part, (given, made) in NAMES.items()
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
        "checked": {**compared._asdict(), "tolerance": TOLERANCE},
    }


# Recording


class RecordedGrid(TokenGrid):
    """A grid that takes the ids as they are: to look at them is to choose."""

    def check(self, tokens: Tensor) -> None:
        """Nothing."""


class Recorded(TorchFunctionMode):
    """What torch is asked for while a program is recorded, in a way that can be recorded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.split and is_block(*args, **kwargs):
            return (args[0],)
        if func is torch.searchsorted and kwargs == {"right": True}:
            edges, values = args
            return (edges.unsqueeze(-2) <= values.unsqueeze(-1)).sum(-1)  # ONNX cannot search
        return func(*args, **kwargs)


def is_block(rows: Tensor, held: Any, dim: int = 0) -> bool:
    """Whether the rows of any number of images are to be cut into blocks of this size."""
    return dim == 0 and isinstance(held, int) and isinstance(rows.shape[0], torch.SymInt)


class Program(nn.Module):
    """One part of a tokenizer, as a network."""

    def __init__(self, tokenizer: Tokenizer, part: Part) -> None:
        super().__init__()
        self.tokenizer, self.part = copy.deepcopy(tokenizer), part
        for module in self.tokenizer.modules():
            if isinstance(grid := vars(module).get("grid"), TokenGrid):
                vars(module)["grid"] = RecordedGrid(**{each.name: getattr(grid, each.name) for each in fields(grid)})

    def forward(self, given: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to tokens `(B, *grid.shape)`, or back."""
        with Recorded():
            return self.tokenizer.encode(given) if self.part == "encoder" else self.tokenizer.decode(given)


def trace(tokenizer: Tokenizer, part: Part, example: Tensor) -> ExportedProgram:
    """The program of a part, recorded on `example`, an input of two images or more. Raises `ExportError` for a model
    that cannot be recorded."""
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                Program(tokenizer, part).eval(), (example,), dynamic_shapes=({0: Dim.DYNAMIC},)
            )
            drop_unused(program)
            return program
    except Exception as error:  # of many kinds, by what the model does
        raise ExportError(f"this {tokenizer.name} cannot be recorded: its {part}: {first_line(error)}") from error


def drop_unused(program: ExportedProgram) -> None:
    """Remove the weights that the program does not use: those of the other part."""
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
def quiet() -> Iterator[None]:
    """Without what exporters log and warn of on their way."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """The innermost reason of an error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no reason given'])[0][:200]}"


# Files


def write(program: ExportedProgram, part: Part, path: Path) -> None:
    """A `.pt2` archive, which `torch.export.load` reads and AOTInductor compiles; or an ONNX file whose first axes are
    called `batch`, with large weights beside it in `<name>.data`. Raises `ExportError`."""
    if path.suffix == ".pt2":
        with quiet():
            torch.export.save(program, path)
        return
    given, made = NAMES[part]
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    try:
        with quiet():
            written = torch.onnx.export(
                program, dynamo=True, input_names=[given], output_names=[made], verbose=False, optimize=True
            )
            assert written is not None
            for value in (*written.model.graph.inputs, *written.model.graph.outputs):
                shape: Any = value.shape
                shape[0] = "batch"
            written.save(str(path), external_data=size > INSIDE)
    except Exception as error:  # of many kinds: a missing operation is one of onnxscript's
        raise ExportError(f"ONNX cannot say what its {part} does: {first_line(error)}") from error


def load(path: Path) -> Run:
    """Run a file by torch, or by onnxruntime on the CPU. Raises `ExportError` for what that does not run: weights of
    some types."""
    if path.suffix == ".pt2":
        with quiet():
            module = torch.export.load(path).module()
        return lambda given: module(given)
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # of many kinds, all of onnxruntime
        raise ExportError(f"onnxruntime does not run its {path.stem}: {first_line(error)}") from error
    name = session.get_inputs()[0].name
    return lambda given: torch.from_numpy(session.run(None, {name: given.numpy()})[0])


# Checks


@torch.no_grad()
def check(tokenizer: Tokenizer, encode: Run, decode: Run, images: Tensor) -> Checked:
    """Compare a file's `encode` and `decode` with the tokenizer's, on `images` (B, C, H, W) in [-1, 1], one at a time
    and together.

    All tokens have to be the same, except close calls: where the tokenizer itself gives another id to an image that is
    changed by less than its float32 rounds. Pixels have to be the same to within `TOLERANCE`. Raises `ExportError`.
    """
    expected = tokenizer.encode(images)
    pixels = tokenizer.decode(expected)
    close, difference = 0, 0.0
    for size in sorted({1, len(images)}):
        found = torch.cat([encode(part.contiguous()) for part in images.split(size)])
        painted = torch.cat([decode(part.contiguous()) for part in expected.split(size)])
        for what, one, other in (("encoder", found, expected), ("decoder", painted, pixels)):
            if (one.dtype, one.shape) != (other.dtype, other.shape):
                forms = [f"{each.dtype} of shape {tuple(each.shape)}" for each in (one, other)]
                raise ExportError(f"its {what} gives {forms[0]}, the tokenizer {forms[1]}")
        differs = found != expected
        if bool(differs.any()) and (wrong := int((differs & ~close_calls(tokenizer, images, expected)).sum())):
            raise ExportError(
                f"its encoder gives other ids than the tokenizer: {wrong:,} of {expected.numel():,} differ"
            )
        apart = float((painted - pixels).abs().max())
        if not apart <= TOLERANCE:  # NaN neither
            raise ExportError(f"its decoder gives other pixels than the tokenizer: up to {apart:.2g} (of 2) apart")
        close, difference = max(close, int(differs.sum())), max(difference, apart)
    return Checked(len(images), expected.numel(), close, difference)


def close_calls(tokenizer: Tokenizer, images: Tensor, tokens: Tensor) -> Tensor:
    """Which of the `tokens` of `images` are others for images that are hardly different, bool as `tokens`."""
    generator = torch.Generator().manual_seed(0)
    close = torch.zeros_like(tokens, dtype=torch.bool)
    for _ in range(8):
        moved = images + NEARBY * (torch.rand(images.shape, generator=generator, dtype=images.dtype) * 2 - 1)
        close |= tokenizer.encode(moved.clamp(-1, 1)) != tokens
    return close
