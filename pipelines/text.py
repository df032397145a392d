"""Text as vectors: built-in hashed n-grams, or a function of the user's."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config.importing import IMPORTED

NGRAMS = re.compile(r"ngrams:([1-9]\d{0,4})")
LENGTHS = range(2, 5)  # characters of an n-gram
MAX_SIZE = 1 << 14  # of a vector column
BATCH = 256  # texts given to a function at once


def encode_text(encoder: str, texts: Sequence[str]) -> Tensor:
    """Encode texts with the built-in encoder `ngrams:SIZE`, float32 `(n, SIZE)`. Raises `ValueError` for any other
    name, so that a name found in a file never runs code."""
    found = NGRAMS.fullmatch(encoder)
    if found is None or int(found[1]) > MAX_SIZE:
        raise ValueError(
            f"{encoder!r} is not a built-in text encoder; allowed is ngrams:SIZE, with SIZE up to {MAX_SIZE}"
        )
    vectors = np.zeros((len(texts), int(found[1])), np.float32)
    for row, text in enumerate(texts):
        vectors[row] = hash_ngrams(text, int(found[1]))
    return torch.from_numpy(vectors)


def hash_ngrams(text: str, size: int) -> np.ndarray:
    """Count the n-grams of 2 to 4 characters, hashed to `size` places with a sign, as a vector of length 1. Case does
    not count. The result is the same in every process."""
    padded = f" {unicodedata.normalize('NFKC', text).casefold().strip()} "
    counts = np.zeros(size)
    for length in LENGTHS:
        for start in range(len(padded) - length + 1):
            code = hash_gram(padded[start : start + length])
            counts[code // 2 % size] += 1 - 2 * (code % 2)
    return counts / max(1.0, float(np.sqrt((counts**2).sum())))


@lru_cache(1 << 16)
def hash_gram(gram: str) -> int:
    return int.from_bytes(blake2b(gram.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def run_encoder(encoder: str, texts: Sequence[str]) -> Tensor:
    """Encode texts with `ngrams:SIZE`, or with the function MODULE:FUNCTION, which maps a list of strings to numbers
    `(n, d)`. Its module must have been loaded by `--import`, so that only the command line decides what runs. Raises
    `ValueError`."""
    module, colon, function = encoder.partition(":")
    if not colon or module == "ngrams":
        return encode_text(encoder, texts)
    if module not in [Path(name).stem if name.endswith(".py") else name for name in IMPORTED]:
        raise ValueError(f"the module of {encoder!r} is not loaded; add --import {module}")
    encode: Any = getattr(sys.modules[module], function, None)
    if not callable(encode):
        raise ValueError(f"{module} has no function {function!r}")
    parts = list[np.ndarray]()
    for start in range(0, len(texts), BATCH):
        some = list(texts[start : start + BATCH])
        part = np.asarray(encode(some))
        size = parts[0].shape[1] if parts else part.shape[-1] if part.ndim else 0
        if part.shape != (len(some), size) or part.dtype.kind not in "iuf":
            raise ValueError(
                f"{encoder} must return ({len(some)}, d) numbers for {len(some)} texts (got {part.shape} {part.dtype})"
            )
        parts.append(part.astype(np.float32))
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, 1)
