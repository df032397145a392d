"""What the files in `tests/fixtures/on_disk` hold, as plain facts: the writer records them, and a test compares them.

Numbers are taken from inputs that follow a formula. Ids and everything else that is exact is compared exactly, floats
within a tolerance.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from launch import COMMON, arguments, exact
from one_process import one_process
from small_pipelines import GIVEN
from torch import Tensor

from pipelines import ImagePipeline
from pipelines.canvas import load_canvas
from pipelines.compression import coding
from pipelines.frequencies import Frequencies
from pipelines.images import DataConfig, load_images
from pipelines.images.sources import hash_names
from pipelines.images.splits import Inherited, read_splits
from pipelines.tokens import load_tokens
from pipelines.train_prior import main as train_prior
from prior import Prior
from prior.columns import ClassColumn, Column, FlagsColumn
from prior.given import Given
from tokenizer import Tokenizer

FOLDER = Path(__file__).parents[1] / "fixtures" / "on_disk"
ALL_COLUMNS = {
    **GIVEN,
    **{"label": "dog", "text": [k / 16 for k in range(16)], "outline": torch.arange(-1, 95).view(8, 12) % 8},
}
"""A value of each column of the pipeline `conditions`; equal to the bit on every machine, as its digest is stored."""
COUNTED: dict[str, Column] = {"label": ClassColumn.numbered(3), "tags": FlagsColumn(names=["red", "old"])}
"""The columns of `frequencies`."""
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens": ("plain", {}),
    "lossless": ("plain", {"lossless": True}),
    "labels": ("plain", {"condition": {"label": ["dog", "eel", "dog"]}}),
    "conditions": ("conditions", {"condition": ALL_COLUMNS}),
    "tiles": ("plain", {"tile": True}),
    "levels": ("depth", {}),
    "clips": ("clips", {}),
    "rgba": ("rgba", {"lossless": True}),
}
"""Of each stream, the pipeline and the options of `compress`."""
RUN = arguments(
    {
        **COMMON,
        **{"tokens": "tokens/labels", "attributes": [], "out": "run", "model": "marginal"},
        **{"train.steps": 6, "train.warmup_steps": 1, "train.evaluate_every": 2},
    }
)
"""The command that was stopped after three steps."""


def pattern(*shape: int, values: int = 256, seed: int = 0) -> Tensor:
    """Whole numbers below `values` that look random, the same everywhere."""
    numbers = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(1000 * seed + 1)
    mixed = numbers * np.uint64(2654435761) % np.uint64(1 << 32)
    return torch.from_numpy((mixed >> np.uint64(9)).astype(np.int64) % values).view(*shape)


def images_for(model: Tokenizer, count: int = 3, seed: int = 0) -> Tensor:
    """uint8 images of the tokenizer's shape, the frames of clips cut from below one another."""
    spec = model.spec
    pixels = pattern(count, spec.channels, spec.frames, *spec.size, seed=seed).to(torch.uint8)
    return pixels.transpose(1, 2).reshape(count, *spec.shape)


def numbers(values: Any, most: int = 8) -> list[float]:
    """At most about `most` of the values, evenly spaced."""
    flat = torch.as_tensor(values).detach().double().flatten()
    return [float(f"{value:.7g}") for value in flat[:: max(1, len(flat) // most)].tolist()]


def ids(values: Tensor) -> str:
    """The sha256 of ids and their shape."""
    text = f"{tuple(values.shape)} {values.long().flatten().tolist()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Facts


def read_tokenizer(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Load a tokenizer; encode images, and decode ids."""
    model = Tokenizer.from_pretrained(folder, dtype=dtype)
    images = images_for(model).to(dtype) / 127.5 - 1
    with torch.no_grad():
        pixels = model.decode(pattern(2, *model.grid.shape, values=model.grid.vocab_size))
        return {"fingerprint": model.fingerprint(), "tokens": ids(model.encode(images)), "pixels": numbers(pixels)}


def read_prior(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Load a prior and score ids, given classes and angles."""
    model = Prior.from_pretrained(folder, dtype=dtype)
    tokens = pattern(3, *model.grid.shape, values=model.grid.vocab_size)
    condition = {name: [350.0, None, 10.0] for name in model.config.conditions}
    with torch.no_grad():
        scores = model.log_prob(tokens, torch.tensor([0, 1, 2]), condition=condition)
    return {"fingerprint": model.fingerprint(), "log_prob": numbers(scores)}


def read_pipeline(folder: Path) -> dict[str, Any]:
    """Load a pipeline with everything beside its models, and score images."""
    pipe = ImagePipeline.from_pretrained(folder)
    images = images_for(pipe.tokenizer, seed=1)
    condition = ALL_COLUMNS if pipe.prior.config.conditions else {"label": "cat"}
    facts = {
        "parts": {name: model.fingerprint() for name, model in pipe.models.items()},
        "labels": pipe.labels,
        "columns": {name: column.to_dict() for name, column in pipe.prior.config.conditions.items()},
        "sampler": pipe.sampler.to_dict(),
        "provenance": pipe.provenance,
        "picture": None if pipe.sample_grid is None else list(pipe.sample_grid.shape),
        "tokens": ids(pipe.encode(images)),
        "log_prob": numbers(pipe.log_prob(images, condition=condition)),
    }
    if pipe.inference.fits:
        facts["inference"] = repr(pipe.inference)
        facts["posterior"] = numbers(pipe.infer(images, "label").log_density)
        facts["open class"] = numbers(pipe.log_prob(images, marginal="label"))
    if pipe.calibration is not None:
        facts["calibration"], given = repr(pipe.calibration), {"marginal": pipe.calibration.marginal}
        for method in pipe.calibration.scores:
            facts[f"score {method}"] = numbers(pipe.anomaly_score(images, method=method, **given))
        facts["map"] = numbers(pipe.anomaly_map(images))
    return facts


def read_tokens(folder: Path) -> dict[str, Any]:
    """Load a token dataset."""
    data = load_tokens(folder, verify=True)
    facts: dict[str, Any] = {
        "grid": str(data.grid),
        "classes": data.class_names,
        "source": data.source,
        "columns": {name: column.to_dict() for name, column in data.columns.items() if name != "label"},
        "condition sources": dict(data.condition_sources),
        "tokenizers": [model.fingerprint() for model in (data.tokenizer, *data.condition_tokenizers.values())],
    }
    for name, split in data.splits.items():
        others, label = split.given[:].without(["label"]), split.given.rows.get("label")
        facts[name] = {
            "drawn": split.stochastic,
            "tokens": ids(torch.as_tensor(np.asarray(split.tokens))),
            "labels": None if label is None else label.tolist(),
            "values": {name: numbers(values.nan_to_num(-7)) for name, values in others.rows.items()},
        }
    return facts


def read_stream(path: Path) -> dict[str, Any]:
    """Decompress a stream and record its ids, and the images."""
    name, options = STREAMS[path.stem]
    pipe = ImagePipeline.from_pretrained(FOLDER / "pipelines" / name)
    found, decode = [], coding.Models.decode

    def watched(*given: Any) -> Any:
        tokens, pixels = decode(*given)
        found.append(tokens)
        return tokens, pixels

    with patch.object(coding.Models, "decode", watched):
        images = coding.decompress(pipe, path.read_bytes(), condition=options.get("condition"), progress=False)
    several = images if isinstance(images, list) else [images]
    several = [image.movedim(-3, 1).flatten(2, -2) for image in several]  # the frames of clips below one another
    facts = {"tokens": ids(torch.cat(found)), "shapes": [list(image.shape) for image in several]}
    if options.get("lossless"):
        facts["pixels"] = ids(((several[0] + 1) * 127.5).round())
    else:
        facts["pixels"] = numbers(torch.cat([image.flatten() for image in several]))
    return facts


def read_set(path: Path) -> dict[str, Any]:
    """Read a set of generated images."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: [str(each.dtype), ids(torch.from_numpy(each))] for name, each in arrays.items()}
    data = DataConfig(source=str(path), image_size=(8, 12), channels=1, validation_fraction=0.0)
    found = load_images(data, inherited=Inherited("position")).held_out
    return {"classes": found.class_names, "pixels": ids(torch.as_tensor(found.pixels(np.arange(len(found)))))}


def read_run(folder: Path) -> dict[str, Any]:
    """Continue the interrupted run in a copy of all fixtures; the record of all four steps."""
    with TemporaryDirectory() as copy, one_process(), in_folder(copy):
        shutil.copytree(folder, "run")
        shutil.copytree(folder.parent / "tokens", "tokens")
        before = len(exact(Path("run")))
        train_prior(RUN)
        state = json.loads(max(Path("run/state").glob("*/state.json")).read_text())
        return {"lines before": before, "step": state["step"], "record": exact(Path("run"))}


def read_export(folder: Path) -> dict[str, Any]:
    """Run an exported encoder."""
    import onnxruntime

    facts = json.loads((folder / "export.json").read_text())
    session = onnxruntime.InferenceSession(str(folder / facts["encoder"]["file"]), providers=["CPUExecutionProvider"])
    images = pattern(3, *facts["encoder"]["takes"]["shape"][1:]).float() / 127.5 - 1
    return {"export.json": facts, "tokens": ids(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))}


def read_division(path: Path) -> dict[str, Any]:
    """Read how images were divided; the part of names today."""
    facts = read_splits(path)
    assert facts is not None
    below, start = facts.thresholds
    hashes = hash_names(f"{number}.png" for number in range(100)).tolist()
    parts = ["held_out" if each < below else "validation" if each >= start else "train" for each in hashes]
    return {"parts": " ".join(parts), "facts": facts.to_dict(), "text": facts.describe()}


def read_canvas(path: Path) -> dict[str, Any]:
    """Read a canvas."""
    canvas = load_canvas(path)
    chain = [getattr(canvas.chain, name) for name in ("size", "stride", "wrap", "order")]
    return {"tokens": ids(canvas.tokens), "known": ids(canvas.known), "prior": canvas.prior, "chain": chain}


def read_frequencies(path: Path) -> dict[str, Any]:
    """Read how often classes occur; their probabilities given a flag."""
    found, red = Frequencies.load(path.parent, COUNTED), {"tags": torch.tensor([[1.0, torch.nan]])}
    nats = [found.log_prob("label", Given(COUNTED, rows, 1))[0] for rows in ({}, red)]
    return {"nothing": numbers(nats[0].exp()), "red": numbers(nats[1].exp()), "text": found.describe("label", red)}


READ: dict[str, Callable[..., dict[str, Any]]] = {
    "tokenizers": read_tokenizer,
    "priors": read_prior,
    "pipelines": read_pipeline,
    "tokens": read_tokens,
    "run": read_run,
    "run_of_0.4": read_run,
    "streams": read_stream,
    "sets": read_set,
    "splits": read_division,
    "frequencies": read_frequencies,
    "angles": read_prior,
    "canvases": read_canvas,
    "export": read_export,
}
"""The parts of the fixtures, each with the function that reads one of its entries."""


def entries_of(part: str) -> list[str]:
    """The names of a part's fixtures; those that are one folder have one."""
    if part in ("run", "run_of_0.4", "export"):
        return [part]
    return [f"{part}/{path.name}" for path in sorted((FOLDER / part).iterdir())]


@contextmanager
def in_folder(folder: str) -> Iterator[None]:
    """Run a block in another working directory."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
