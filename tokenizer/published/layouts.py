"""How a project names the weights of its network, and what the shapes of the weights say of its sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import WeightsError

Weights = dict[str, Tensor]
Reader = Callable[[dict[str, Any], dict[str, Any], Path], dict[str, Any]]
"""Of settings that lie beside the weights, and the sizes that the weights have: what else a configuration has to say.
Raises `FormatError` or `ConfigError` where the two do not fit, or the settings mean another network."""

SHARED = (
    (r"^encoder\.project\.", "quant_conv."),
    (r"^decoder\.project\.", "post_quant_conv."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"^quantizer\.(proj|embed)\.", r"quantize.\1."),  # GumbelVQ
    (r"^(encoder|decoder)\.stem\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.", r"\1.conv_out."),
)


def as_they_are(weights: Weights) -> Weights:
    """For a layout that needs no other `prepare`."""
    return weights


@dataclass(frozen=True)
class Layout:
    """A project's names: the substitutions `names`, one after the other, turn our names of weights into its."""

    title: str
    kind: Any
    """Our network that its weights fit, a class of `Autoencoder`."""
    fits: Callable[[Weights], bool]
    """Whether weights have names, and the first of them shapes, as this project's have."""
    sizes: Callable[[Shapes], dict[str, Any]]
    """The configuration, as far as shapes say it. Raises `WeightsError`."""
    names: tuple[tuple[str, str], ...]
    training: str = r"(?!)"
    """Pattern of its weights that only training needs."""
    finest_first: bool = False
    """Whether it numbers the decoder's levels from the finest, that is, against the order in which they run."""
    prepare: Callable[[Weights], Weights] = as_they_are
    """Its weights in the form of ours, by its names."""
    settings: Reader | None = None
    """Reads the `config.json` beside the weights; None: it has none."""
    needs_settings: bool = False
    more: dict[str, Any] = field(default_factory=dict)
    """What of its configuration shapes do not say."""

    def published(self, key: str, levels: int) -> str:
        """Its name for our weight `key`, in a network of `levels` levels."""
        if self.finest_first:
            numbered = r"^(decoder\.(?:levels|adaptive))\.(\d+)"
            key = re.sub(numbered, lambda found: f"{found[1]}.{levels - 1 - int(found[2])}", key)
        for pattern, name in (*SHARED, *self.names):
            key = re.sub(pattern, name, key)
        return key


class Shapes:
    """Shapes of a project's weights, by our names of them."""

    def __init__(self, weights: Weights, layout: Layout, path: Path) -> None:
        self.weights, self.layout, self.path = weights, layout, path
        self.levels = 0  # all layouts number the encoder's levels from the finest
        self.levels = self.count("encoder.levels.{}.blocks.0.conv1.weight")

    def of(self, key: str, axes: int = 4) -> tuple[int, ...]:
        """The shape of `key`. Raises `WeightsError` if it is not there or has another number of axes."""
        name = self.layout.published(key, self.levels)
        found = tuple(self.weights[name].shape) if name in self.weights else ()
        if len(found) != axes:
            problem = f"has shape {list(found)}, expected {axes} axes" if name in self.weights else "is missing"
            raise WeightsError(f"{self.path}: {name} {problem}")
        return found

    def there(self, key: str) -> bool:
        """Whether there is such a weight."""
        return self.layout.published(key, self.levels) in self.weights

    def count(self, key: str) -> int:
        """How many weights there are of the name `key`, which has {} in place of a number."""
        return next(index for index in range(len(self.weights) + 1) if not self.there(key.format(index)))

    def stem_and_levels(self) -> dict[str, Any]:
        """`channels`, `widths`, `stem` and `blocks` of an encoder."""
        stem = self.of("encoder.stem.weight")
        levels = range(max(1, self.levels))  # of none the first is missing
        widths = tuple(self.of(f"encoder.levels.{level}.blocks.0.conv1.weight")[0] for level in levels)
        return {
            "channels": stem[1],
            "widths": widths,
            "stem": None if stem[0] == widths[0] else stem[0],
            "blocks": self.count("encoder.levels.0.blocks.{}.conv1.weight"),
        }

    def codebook(self) -> dict[str, Any]:
        """`codes` and `dim`, and that they are the `vq` quantizer's."""
        codes, dim = self.of("quantizer.codebook", axes=2)
        return {"kind": "vq", "codes": codes, "dim": dim}
