"""Exported tokenizers, of every kind and quantizer and in every format, give what the tokenizer gives."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from folders import contents
from small import QUANTIZERS, TOKENIZERS, make_tokenizer, quantizer_of
from torch import Tensor

import pipelines
from pipelines import exports
from pipelines.exports import (
    EXPORT_SUFFIXES,
    IO_NAMES,
    ONNX_PACKAGES,
    PIXEL_TOLERANCE,
    Checked,
    ExportError,
    Run,
    compare_outputs,
    export_tokenizer,
    load_program,
)
from tokenizer import Tokenizer
from tokenizer.files import PathError

SIZE = (8, 8)
LIKELIHOODS = ("categorical", "discretized_logistic")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TOKENIZERS if name not in ("vqvae", "frame_by_frame")},
    **{f"vqvae, {name}": ("vqvae", {"quantizer": quantizer_of(name, 2, 2)}) for name in QUANTIZERS},
    "vqvae, directions": ("vqvae", {"quantizer": {"kind": "ema", "codes": 32, "dim": 8, "normalize": True}}),
    **{f"vqvae, {name}": ("vqvae", {"likelihood": {"kind": name}}) for name in LIKELIHOODS},
}
every_format = pytest.mark.parametrize(
    "format", [pytest.param(name, marks=pytest.mark.slow if name == "onnx" else ()) for name in EXPORT_SUFFIXES]
)
BLOCKS = 32 * 6  # limit on a distance matrix: blocks of 6 rows
RECORDED = [pytest.param("onnx", case, marks=() if case == "vqvae, ema" else pytest.mark.slow) for case in CASES] + [
    pytest.param("torch", case, marks=() if case == "klvae" else pytest.mark.slow)
    for case in ("klvae", "titok", "vqvae, lfq", "vqvae, rvq")
]
"""Every case in ONNX, most of them slow; ONNX is made from torch programs, so a few of those are enough."""


def needs(format: str) -> None:
    """Skip the test where the format's packages are not installed."""
    for package in ONNX_PACKAGES if format == "onnx" else ():
        pytest.importorskip(package)


def tokenizer_of(case: str) -> Tokenizer:
    """A small tokenizer with random weights, whose codebook has seen a training step."""
    kind, config = CASES[case]
    torch.manual_seed(0)
    model = make_tokenizer(kind, SIZE, 3, **config)
    model.train()(images_for(model, 8))
    return model.eval()


def loaded(folder: Path) -> list[Run]:
    """Load encoder and decoder as functions."""
    return [load_program(next(folder.glob(f"{part}.*"))) for part in IO_NAMES]


def images_for(tokenizer: Tokenizer, count: int) -> Tensor:
    return torch.rand(count, *tokenizer.image_shape) * 2 - 1


@dataclass
class Exported:
    """A tokenizer, its fingerprint before the export, the given images, the comparison, and the folder."""

    tokenizer: Tokenizer
    before: str
    given: Tensor
    found: Checked
    folder: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Export a case in a format, once. held: limit on the elements of a distance matrix."""

    @functools.cache
    def export(format: Any, case: str, held: int | None = None) -> Exported:
        needs(format)
        tokenizer, folder = tokenizer_of(case), tmp_path_factory.mktemp("exported") / "out"
        before, mine = tokenizer.fingerprint(), images_for(tokenizer, 2)
        with pytest.MonkeyPatch.context() as patch:
            if held:
                patch.setattr("tokenizer.quantizers.codebook.SEARCH_ELEMENTS", held)
            return Exported(tokenizer, before, mine, export_tokenizer(tokenizer, folder, format, mine), folder)

    return export


@pytest.mark.parametrize(("format", "case"), RECORDED)
def test_a_file_gives_the_tokens_and_pixels_of_the_tokenizer(format: Any, case: str, exported: Any) -> None:
    export = exported(format, case)
    tokenizer, found = export.tokenizer, export.found
    assert (found.close_calls, found.tokens) == (0, 10 * len(tokenizer.grid))
    assert tokenizer.fingerprint() == export.before
    encode, decode = loaded(export.folder)
    for count in (1, 5):  # neither is the batch size of the trace
        images = images_for(tokenizer, count)
        with torch.no_grad():
            tokens = tokenizer.encode(images)
            assert torch.equal(encode(images), tokens)
            assert (decode(tokens) - tokenizer.decode(tokens)).abs().max() < PIXEL_TOLERANCE


def test_a_tokenizer_of_clips_is_refused_and_that_of_its_frames_is_not(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("frame_by_frame", SIZE, 3).eval()
    with pytest.raises(ExportError, match="^a tokenizer of clips cannot be exported; export that of its frames"):
        export_tokenizer(tokenizer, tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()
    assert export_tokenizer(tokenizer.tokenizer, tmp_path / "out", "torch").tokens > 0


@every_format
def test_a_program_is_not_specialised_to_a_number_of_blocks(format: Any, exported: Any, monkeypatch) -> None:
    """The tokenizer splits large batches into blocks; the trace, of a smaller batch, must not fix their number."""
    export = exported(format, "vqvae, ema", BLOCKS)
    monkeypatch.setattr("tokenizer.quantizers.codebook.SEARCH_ELEMENTS", BLOCKS)
    images = images_for(export.tokenizer, 11)
    encode, _ = loaded(export.folder)
    assert torch.equal(encode(images), export.tokenizer.encode(images))


def test_a_file_runs_without_smalti_and_torch(exported: Any) -> None:
    export = exported("onnx", "vqvae, ema")
    tokenizer, tmp_path = export.tokenizer, export.folder.parent
    images = images_for(tokenizer, 5)
    np.save(tmp_path / "images.npy", images.numpy())
    script = """
import json, sys, numpy, onnxruntime
facts, given = json.load(open("out/export.json")), numpy.load("images.npy")
made = []
for part in ("encoder", "decoder"):
    session = onnxruntime.InferenceSession("out/" + facts[part]["file"])
    takes, gives = session.get_inputs()[0], session.get_outputs()[0]
    for fact, found in ((facts[part]["takes"], takes), (facts[part]["gives"], gives)):
        assert fact["name"] == found.name and fact["shape"] == found.shape, (fact, found.name, found.shape)
    assert given.dtype == facts[part]["takes"]["type"] and list(given.shape[1:]) == takes.shape[1:]
    given = session.run([gives.name], {takes.name: given})[0]
    low, high = facts[part]["gives"]["range"]
    assert given.dtype == facts[part]["gives"]["type"] and low <= given.min() and given.max() <= high
    numpy.save(part + ".npy", given)
assert not {"torch", "tokenizer", "pipelines"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True, timeout=200)
    tokens = tokenizer.encode(images)
    assert np.array_equal(np.load(tmp_path / "encoder.npy"), tokens.numpy())
    assert np.abs(np.load(tmp_path / "decoder.npy") - tokenizer.decode(tokens).detach().numpy()).max() < PIXEL_TOLERANCE


def test_a_program_holds_only_its_own_weights_and_no_image_of_the_user(exported: Any) -> None:
    export = exported("torch", "vqvae, ema", BLOCKS)
    for part, other in (("encoder", "decoder"), ("decoder", "encoder")):
        program = torch.export.load(export.folder / f"{part}.pt2")
        names = set(program.state_dict)
        assert any(name.startswith(f"tokenizer.{part}.") for name in names)
        assert not [name for name in names if name.startswith(f"tokenizer.{other}.")]
    data = b"".join((export.folder / f"{part}.pt2").read_bytes() for part in IO_NAMES)
    assert export.given[0].numpy().tobytes()[:64] not in data


@pytest.mark.parametrize("format", EXPORT_SUFFIXES)
def test_the_files_contain_no_path_of_this_machine(format: Any, exported: Any) -> None:
    folder = exported(format, "vqvae, ema", BLOCKS if format == "torch" else None).folder
    for path in sorted(folder.iterdir()):
        texts = [path.read_bytes()]
        if path.suffix == ".pt2":
            with ZipFile(path) as archive:
                texts += [archive.read(name) for name in archive.namelist()]
        for place in (Path(torch.__file__).parents[1], Path(pipelines.__file__).parents[1], folder.parent):
            assert not any(str(place).encode() in text for text in texts), (path.name, place)


# Errors


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_file_with_other_results_is_not_kept(part: str, tmp_path: Path, monkeypatch) -> None:
    """The written program is given other weights."""
    tokenizer = tokenizer_of("vqvae, ema")
    honest = exports.write_program

    def forged(program: Any, of: Any, path: Path) -> None:
        if of == part:
            for weight in program.state_dict.values():
                weight.data.mul_(0.5) if weight.is_floating_point() else None
        honest(program, of, path)

    monkeypatch.setattr(exports, "write_program", forged)
    with pytest.raises(ExportError, match=part):
        export_tokenizer(tokenizer, tmp_path / "out", "torch")
    assert contents(tmp_path) == {}


def test_only_close_calls_may_differ() -> None:
    """Compare a tokenizer that thresholds pixels with programs whose threshold differs."""
    tokenizer = make_tokenizer("pixels", SIZE, 1, levels=2).eval()  # an id says whether a pixel is above 0
    images = torch.full((2, 1, *SIZE), 0.7)
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 1e-6, 1e-3

    def above(threshold: float):
        return lambda given: (given > threshold).long().flatten(1, 2)

    decode = tokenizer.decode
    assert compare_outputs(tokenizer, above(0.0), decode, images).close_calls == 0
    assert compare_outputs(tokenizer, above(1e-5), decode, images).close_calls == 1  # 1e-6 is within rounding
    with pytest.raises(ExportError, match="1 of 128"):
        compare_outputs(tokenizer, above(1e-2), decode, images)
    with pytest.raises(ExportError, match="torch.int32"):
        compare_outputs(tokenizer, lambda given: above(0.0)(given).int(), decode, images)
    for wrong in (lambda tokens: decode(tokens) + 2 * PIXEL_TOLERANCE, lambda tokens: decode(tokens) * float("nan")):
        with pytest.raises(ExportError, match="decoder"):
            compare_outputs(tokenizer, above(0.0), wrong, images)


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(exports, "find_spec", lambda name: None if name != "onnx" else object())
    with pytest.raises(ExportError, match="onnxscript, onnxruntime"):
        export_tokenizer(tokenizer_of("pixels"), tmp_path / "out", "onnx")


def test_only_an_export_is_replaced(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("pixels").train()
    for _ in range(2):
        export_tokenizer(tokenizer, tmp_path / "out", "torch")
    assert all(module.training for module in tokenizer.modules())
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(PathError, match="mine.txt"):
        export_tokenizer(tokenizer, tmp_path / "out", "torch")
