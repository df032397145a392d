"""Encodes of small images by a small tokenizer, some of which are interrupted."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipelines import encode
from pipelines.encode import EncodeConfig, run

SHIFT = {"augment": {"shift": 3}}


def write_classes(folder, names, count=3, seed=0):
    for split in ("train", "test"):
        for number, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([seed, number, index, len(split)]).integers(
                    0, 256, (28, 28), dtype=np.uint8
                )
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return {"source": str(folder)}


def config(tokenizer, out, data, **options):
    return EncodeConfig(tokenizer=str(tokenizer), out=str(out), data=data, **{"batch_size": 4, **options})


def interrupted(monkeypatch, *arguments, after=4, **options):
    """An encode that is interrupted before its fifth batch."""
    calls, real = [], encode.variants_of

    def stop(*given):
        calls.append(given)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "variants_of", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config(*arguments, **options))
