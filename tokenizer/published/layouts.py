"""Layouts: a project's weight names, and how to derive sizes from weight shapes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import WeightsError

Weights = dict[str, Tensor]
SettingsReader = Callable[[dict[str, Any], dict[str, Any], Path], dict[str, Any]]
"""Maps (settings of a `config.json`, sizes derived from the weights, path of the file) to further configuration. Raises
`FormatError` or `ConfigError` if settings and sizes disagree or a setting is not supported."""

SHARED = (
    (r"^encoder\.project\.", "quant_conv."),
    (r"^decoder\.project\.", "post_quant_conv."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"^quantizer\.(proj|embed)\.", r"quantize.\1."),  # GumbelVQ
    (r"^(encoder|decoder)\.stem\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.", r"\1.conv_out."),
)


@dataclass(frozen=True)
class Layout:
    """A project's weight names. The regular-expression substitutions `SHARED` and then `names` map our names to the
    project's."""

    title: str
    kind: Any  # our network for the weights, a subclass of `Autoencoder`
    fits: Callable[[Weights], bool]  # whether weights have this project's names and, for the first layers, shapes
    sizes: Callable[[Shapes], dict[str, Any]]  # the configuration that shapes determine; raises `WeightsError`
    names: tuple[tuple[str, str], ...]
    training: str = r"(?!)"  # pattern of weights that only training needs
    finest_first: bool = False  # whether the decoder's levels are numbered against their order of execution
    prepare: Callable[[Weights], Weights] = lambda weights: weights  # converts weights to our form, under their names
    settings: SettingsReader | None = None  # reads the `config.json` beside the weights, if the project writes one
    needs_settings: bool = False
    more: dict[str, Any] = field(default_factory=dict)  # configuration that shapes do not determine

    def published(self, key: str, levels: int) -> str:
        """Return the project's name for our weight `key`, in a network of `levels` levels."""
        if self.finest_first:
            numbered = r"^(decoder\.(?:levels|adaptive))\.(\d+)"
            key = re.sub(numbered, lambda found: f"{found[1]}.{levels - 1 - int(found[2])}", key)
        for pattern, name in (*SHARED, *self.names):
            key = re.sub(pattern, name, key)
        return key


class Shapes:
    """Shapes of a project's weights, indexed by our names."""

    def __init__(self, weights: Weights, layout: Layout, path: Path) -> None:
        self.weights, self.layout, self.path = weights, layout, path
        self.levels = 0  # unused while counting, as all layouts number the encoder's levels from the finest
        self.levels = self.count("encoder.levels.{}.blocks.0.conv1.weight")

    def of(self, key: str, axes: int = 4) -> tuple[int, ...]:
        """Return the shape of `key`. Raises `WeightsError` if it is missing or has another number of axes."""
        name = self.layout.published(key, self.levels)
        shape = tuple(self.weights[name].shape) if name in self.weights else ()
        if len(shape) != axes:
            problem = f"has shape {list(shape)}, expected {axes} axes" if name in self.weights else "is missing"
            raise WeightsError(f"{self.path}: {name} {problem}")
        return shape

    def has(self, key: str) -> bool:
        return self.layout.published(key, self.levels) in self.weights

    def count(self, key: str) -> int:
        """Count the weights named `key` with 0, 1, 2, ... in place of {}."""
        return next(index for index in range(len(self.weights) + 1) if not self.has(key.format(index)))

    def stem_and_levels(self) -> dict[str, Any]:
        stem = self.of("encoder.stem.weight")
        levels = range(max(1, self.levels))  # with zero levels, report level 0 as missing
        widths = tuple(self.of(f"encoder.levels.{level}.blocks.0.conv1.weight")[0] for level in levels)
        return {
            "channels": stem[1],
            "widths": widths,
            "stem": None if stem[0] == widths[0] else stem[0],
            "blocks": self.count("encoder.levels.0.blocks.{}.conv1.weight"),
        }

    def codebook(self) -> dict[str, Any]:
        codes, dim = self.of("quantizer.codebook", axes=2)
        return {"kind": "vq", "codes": codes, "dim": dim}
