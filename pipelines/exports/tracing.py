"""A tokenizer as two programs for any number of images: the encoder, images to tokens, and the decoder, back.

Tokenizers are written for people, who may pass ids that are none, or more images than a matrix of all distances can
hold. A program that is recorded cannot look at its input and choose, so three things are different in it: ids are not
checked, rows are not cut into blocks (which changes no result), and edges are compared to one by one.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

from tokenizer import TokenGrid, Tokenizer

Part = Literal["encoder", "decoder"]
PARTS: tuple[Part, Part] = ("encoder", "decoder")
NAMES: dict[Part, tuple[str, str]] = {"encoder": ("images", "tokens"), "decoder": ("tokens", "images")}
"""What each part takes and what it gives."""


class ExportError(ValueError):
    """A tokenizer cannot be written as such a file, or the file gives something else; the message says why, in one
    line."""


class RecordedGrid(TokenGrid):
    """A grid that takes the ids as they are: to look at them is to choose."""

    def check(self, tokens: Tensor) -> None:
        """Nothing."""


class Recorded(TorchFunctionMode):
    """What torch is asked for while a program is recorded, said in a way that can be."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.split and is_block(*args, **kwargs):
            return (args[0],)
        if func is torch.searchsorted and kwargs == {"right": True}:
            edges, values = args
            return (edges.unsqueeze(-2) <= values.unsqueeze(-1)).sum(-1)  # ONNX cannot search
        return func(*args, **kwargs)


def is_block(rows: Tensor, held: Any, dim: int = 0) -> bool:
    """Whether the rows of any number of images are to be cut into blocks of so many."""
    return dim == 0 and isinstance(held, int) and isinstance(rows.shape[0], torch.SymInt)


class Program(nn.Module):
    """One part of a tokenizer, as a network."""

    def __init__(self, tokenizer: Tokenizer, part: Part) -> None:
        super().__init__()
        self.tokenizer, self.part = tokenizer, part

    def forward(self, given: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to tokens `(B, *grid.shape)`, or back."""
        with Recorded():
            return self.tokenizer.encode(given) if self.part == "encoder" else self.tokenizer.decode(given)


def recordable(tokenizer: Tokenizer) -> Tokenizer:
    """A copy on the CPU, in eval mode, whose grids do not look at ids."""
    model = copy.deepcopy(tokenizer).cpu().eval()
    for module in model.modules():
        if isinstance(grid := vars(module).get("grid"), TokenGrid):
            vars(module)["grid"] = RecordedGrid(**{each.name: getattr(grid, each.name) for each in fields(grid)})
    return model


def trace(tokenizer: Tokenizer, part: Part, example: Tensor) -> ExportedProgram:
    """The program of a part, recorded on `example`, an input of two images or more. Raises `ExportError` for a model
    that cannot be recorded."""
    try:
        with quiet(), torch.no_grad():
            program = Program(recordable(tokenizer), part).eval()
            return needed(torch.export.export(program, (example,), dynamic_shapes=({0: Dim.DYNAMIC},)))
    except Exception as error:  # of many kinds, by what the model does
        raise ExportError(f"this {tokenizer.name} cannot be recorded: its {part}: {first_line(error)}") from error


def needed(program: ExportedProgram) -> ExportedProgram:
    """The program, changed in place, without the weights that it does not use: those of the other part."""
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
    return program


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
