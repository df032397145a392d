"""Some images of a set, as bytes: what is kept on the way, and what the writers take, one part after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from safetensors.numpy import load, save


@dataclass(frozen=True)
class Facts:
    """What is the same for all images of a set: how many, their size in pixels, and the names of their classes, or
    None without labels."""

    count: int
    height: int
    width: int
    class_names: list[str] | None = None

    def key(self, number: int) -> str:
        """The name of an image: its number, with as many digits as the last one needs, and at least five."""
        return f"{number:0{max(5, len(str(self.count - 1)))}d}"


@dataclass(frozen=True)
class Part:
    """Images `first`, `first + 1`, ... of a set: of each its bytes, a PNG file or raw pixels; and its class, or None
    without labels."""

    first: int
    images: list[bytes]
    labels: list[int] | None = None

    def to_bytes(self) -> bytes:
        """As a file."""
        arrays: dict[str, np.ndarray] = {
            "images": np.frombuffer(b"".join(self.images), np.uint8),
            "sizes": np.array([len(image) for image in self.images], np.int64),
        }
        if self.labels is not None:
            arrays["labels"] = np.array(self.labels, np.int64)
        return save(arrays)

    @classmethod
    def from_bytes(cls, data: bytes, first: int) -> Part:
        """What `to_bytes` gave."""
        arrays = load(data)
        ends = np.cumsum(arrays["sizes"]).tolist()
        whole = arrays["images"].tobytes()
        images = [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        return cls(first, images, arrays["labels"].tolist() if "labels" in arrays else None)


@dataclass
class Drawn:
    """Images that were drawn, as `keep` makes bytes of them, until there are enough for a part."""

    keep: Callable[[np.ndarray], bytes]
    images: list[bytes] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, images: np.ndarray, labels: list[int] | None) -> None:
        """Further ones, uint8 (B, H, W, C), and their classes."""
        self.images += map(self.keep, images)
        self.labels += labels or []

    def take(self, first: int, count: int) -> Part:
        """The oldest `count`, which are those from number `first` on."""
        part = Part(first, self.images[:count], self.labels[:count] or None)
        del self.images[:count], self.labels[:count]
        return part


def regrouped(parts: Iterable[Part], size: int) -> Iterator[Part]:
    """The same images in parts of `size`, but for the last one."""
    images: list[bytes] = []
    labels: list[int] = []
    first = 0
    for part in parts:
        images, labels = images + part.images, labels + (part.labels or [])
        while len(images) >= size:
            yield Part(first, images[:size], labels[:size] or None)
            images, labels, first = images[size:], labels[size:], first + size
    if images:
        yield Part(first, images, labels or None)
