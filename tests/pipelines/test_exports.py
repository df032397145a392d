"""Exported tokenizers: every kind and every quantizer, in every format, gives what the tokenizer gives."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import contents
from small import QUANTIZERS, TOKENIZERS, make_tokenizer, quantizer_of
from torch import Tensor

from pipelines import exports
from pipelines.exports import (
    NAMES,
    ONNX_PACKAGES,
    SUFFIXES,
    TOLERANCE,
    Checked,
    ExportError,
    Run,
    check,
    export_tokenizer,
    load,
)
from tokenizer import TokenGrid, Tokenizer
from tokenizer.files import PathError
from tokenizer.pixels import Pixels

SIZE = (8, 8)
LIKELIHOODS = ("categorical", "discretized_logistic")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TOKENIZERS if name != "vqvae"},
    **{f"vqvae, {name}": ("vqvae", {"quantizer": quantizer_of(name, 2, 2)}) for name in QUANTIZERS},
    "vqvae, directions": ("vqvae", {"quantizer": {"kind": "ema", "codes": 32, "dim": 8, "normalize": True}}),
    **{f"vqvae, {name}": ("vqvae", {"likelihood": {"kind": name}}) for name in LIKELIHOODS},
}
every_format = pytest.mark.parametrize(
    "format", [pytest.param(name, marks=pytest.mark.slow if name == "onnx" else ()) for name in SUFFIXES]
)
USUAL = ("palette", "vqvae, ema")
BLOCKS = 32 * 6  # elements of a matrix of distances: blocks of 6 rows
RECORDED = [pytest.param("onnx", case, marks=() if case in USUAL else pytest.mark.slow) for case in CASES] + [
    pytest.param("torch", case, marks=() if case == "klvae" else pytest.mark.slow)
    for case in ("klvae", "titok", "vqvae, lfq", "vqvae, rvq")
]
"""All in ONNX, most of them slow; of what torch's programs say, which ONNX is made from, a few are run, too."""


def needs(format: str) -> None:
    """Skip the test where the format's packages are not installed."""
    for package in ONNX_PACKAGES if format == "onnx" else ():
        pytest.importorskip(package)


def tokenizer_of(case: str) -> Tokenizer:
    """A small tokenizer with random weights, whose codes are those of a training step."""
    kind, config = CASES[case]
    torch.manual_seed(0)
    model = make_tokenizer(kind, SIZE, 3, **config)
    model.train()(images_for(model, 8))
    return model.eval()


def loaded(folder: Path) -> list[Run]:
    """Encoder and decoder, as functions."""
    return [load(next(folder.glob(f"{part}.*"))) for part in NAMES]


def images_for(tokenizer: Tokenizer, count: int) -> Tensor:
    return torch.rand(count, *tokenizer.image_shape) * 2 - 1


@dataclass
class Exported:
    """A tokenizer, its fingerprint before, images that were given, what was compared, and the folder."""

    tokenizer: Tokenizer
    before: str
    given: Tensor
    found: Checked
    folder: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Of a format, a case and how many elements a matrix of distances may hold; each is made once."""

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
    encode, decode = loaded(export.folder)
    for count in (1, 5):  # neither is the number that it was recorded with
        images = images_for(tokenizer, count)
        with torch.no_grad():
            tokens = tokenizer.encode(images)
            assert torch.equal(encode(images), tokens)
            assert (decode(tokens) - tokenizer.decode(tokens)).abs().max() < TOLERANCE


@every_format
def test_a_program_takes_more_images_than_a_matrix_of_distances_may_hold(
    format: Any, exported: Any, monkeypatch
) -> None:
    """The tokenizer cuts its rows into blocks there; the program, recorded on fewer, must not have their number."""
    export = exported(format, "vqvae, ema", BLOCKS)
    monkeypatch.setattr("tokenizer.quantizers.codebook.SEARCH_ELEMENTS", BLOCKS)
    images = images_for(export.tokenizer, 11)
    encode, _ = loaded(export.folder)
    assert torch.equal(encode(images), export.tokenizer.encode(images))


def test_a_file_runs_where_neither_smalti_nor_torch_is(exported: Any) -> None:
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
    for told, found in ((facts[part]["takes"], takes), (facts[part]["gives"], gives)):
        assert told["name"] == found.name and told["shape"] == found.shape, (told, found.name, found.shape)
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
    assert np.abs(np.load(tmp_path / "decoder.npy") - tokenizer.decode(tokens).detach().numpy()).max() < TOLERANCE


def test_a_program_has_its_own_weights_alone_and_no_image_of_anybody(exported: Any) -> None:
    export = exported("torch", "vqvae, ema", BLOCKS)
    for part, other in (("encoder", "decoder"), ("decoder", "encoder")):
        program = torch.export.load(export.folder / f"{part}.pt2")
        names = set(program.state_dict)
        assert any(name.startswith(f"tokenizer.{part}.") for name in names)
        assert not [name for name in names if name.startswith(f"tokenizer.{other}.")]
    data = b"".join((export.folder / f"{part}.pt2").read_bytes() for part in NAMES)
    assert export.given[0].numpy().tobytes()[:64] not in data


@pytest.mark.parametrize(
    ("format", "case"),
    [("torch", "klvae"), *(pytest.param(name, "vqvae, rvq", marks=pytest.mark.slow) for name in SUFFIXES)],
)
def test_exporting_leaves_the_tokenizer_as_it_was(format: Any, case: str, exported: Any) -> None:
    export = exported(format, case)
    tokenizer = export.tokenizer
    assert tokenizer.fingerprint() == export.before and type(tokenizer.grid) is TokenGrid
    with pytest.raises(ValueError, match="token ids should lie in"):
        tokenizer.decode(torch.full((1, *tokenizer.grid.shape), tokenizer.grid.vocab_size))


# What is refused


class Choosing(Pixels):
    """Looks at its images, and chooses."""

    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images if images.mean() > 0 else -images)


def test_a_tokenizer_that_looks_at_its_input_is_refused_in_one_line(tmp_path: Path) -> None:
    model = Choosing(Pixels.Config(image_size=SIZE, channels=1, levels=4)).eval()
    with pytest.raises(ExportError, match=r"^this pixels cannot be recorded: its encoder: .*data-dependent") as caught:
        export_tokenizer(model, tmp_path / "out", "torch")
    assert "\n" not in str(caught.value) and contents(tmp_path) == {}


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_file_that_gives_something_else_is_not_left(part: str, tmp_path: Path, monkeypatch) -> None:
    """Planted: the written program is that of other weights."""
    tokenizer = tokenizer_of("vqvae, ema")
    honest = exports.write

    def forged(program: Any, of: Any, path: Path) -> None:
        if of == part:
            for weight in program.state_dict.values():
                weight.data.mul_(0.5) if weight.is_floating_point() else None
        honest(program, of, path)

    monkeypatch.setattr(exports, "write", forged)
    with pytest.raises(ExportError, match="other ids" if part == "encoder" else "other pixels"):
        export_tokenizer(tokenizer, tmp_path / "out", "torch")
    assert contents(tmp_path) == {}


def test_only_close_calls_may_differ() -> None:
    """A tokenizer of one threshold, held against programs whose threshold lies elsewhere."""
    tokenizer = make_tokenizer("pixels", SIZE, 1, levels=2).eval()  # an id says whether a pixel is above 0
    images = torch.full((2, 1, *SIZE), 0.7)
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 1e-6, 1e-3

    def above(threshold: float):
        return lambda given: (given > threshold).long().flatten(1, 2)

    decode = tokenizer.decode
    assert check(tokenizer, above(0.0), decode, images).close_calls == 0
    assert check(tokenizer, above(1e-5), decode, images).close_calls == 1  # the first one is a matter of rounding
    with pytest.raises(ExportError, match=r"1 of 128 differ"):
        check(tokenizer, above(1e-2), decode, images)
    with pytest.raises(ExportError, match="torch.int32"):
        check(tokenizer, lambda given: above(0.0)(given).int(), decode, images)
    with pytest.raises(ExportError, match="other pixels"):
        check(tokenizer, above(0.0), lambda tokens: decode(tokens) + 2 * TOLERANCE, images)
    with pytest.raises(ExportError, match="other pixels"):
        check(tokenizer, above(0.0), lambda tokens: decode(tokens) * float("nan"), images)


def test_the_tokenizer_of_the_caller_stays_as_it_is(tmp_path: Path, monkeypatch) -> None:
    """It may be trained on, or be a part of a pipeline on a GPU."""
    tokenizer = tokenizer_of("pixels").train()

    def load(path: Path) -> Run:
        return tokenizer.encode if path.stem == "encoder" else tokenizer.decode

    monkeypatch.setattr(exports, "trace", lambda *_: None)
    monkeypatch.setattr(exports, "write", lambda program, part, path: path.touch())
    monkeypatch.setattr(exports, "load", load)
    export_tokenizer(tokenizer, tmp_path / "out", "torch", images_for(tokenizer, 2))
    assert tokenizer.training and all(module.training for module in tokenizer.modules())


def test_what_is_told_is_the_worst_of_one_at_a_time_and_together() -> None:
    """A program may round otherwise for one image than for many."""
    tokenizer = tokenizer_of("pixels")
    images = torch.full((2, *tokenizer.image_shape), 0.5)
    images[0, 0, 0, 0] = 1e-6
    threshold = {1: 1e-5, 2: 0.0}

    class Signs:
        def encode(self, given: Tensor) -> Tensor:
            return (given > 0).long().flatten(1, 2)

        decode = tokenizer.decode

    def alone_otherwise(tokens: Tensor) -> Tensor:
        return tokenizer.decode(tokens) + (TOLERANCE / 2 if len(tokens) == 1 else 0)

    found = check(Signs(), lambda given: (given > threshold[len(given)]).long().flatten(1, 2), alone_otherwise, images)
    assert found.close_calls == 1 and found.pixel_difference > TOLERANCE / 4


def test_a_format_that_there_is_not_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="^format: "):
        export_tokenizer(make_tokenizer("vqvae"), tmp_path / "out", "tflite")


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(exports, "find_spec", lambda name: None if name != "onnx" else object())
    with pytest.raises(ExportError, match="onnxscript, onnxruntime; pip install"):
        export_tokenizer(tokenizer_of("pixels"), tmp_path / "out", "onnx")


def test_weights_that_onnxruntime_does_not_run_are_said_in_one_line(tmp_path: Path) -> None:
    needs("onnx")
    model = make_tokenizer("vqvae").eval().to(torch.bfloat16)
    with pytest.raises(ExportError, match=r"^onnxruntime does not run its encoder: [^\n]+$"):
        export_tokenizer(model, tmp_path / "out", "onnx")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8), r"of shape \(B, 3, 12, 8\), got torch.float32 of shape \(1, 3, 8, 8\)"),
        (torch.zeros(1, 3, 12, 8, dtype=torch.uint8), "should be floats .* got torch.uint8"),
    ],
)
def test_images_of_another_size_or_type_are_named(images: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_tokenizer(make_tokenizer("vqvae").eval(), tmp_path / "out", "torch", images)
    assert contents(tmp_path) == {}


def test_images_of_another_precision_are_images(tmp_path: Path) -> None:
    found = export_tokenizer(
        make_tokenizer("pixels").eval(), tmp_path / "out", "torch", torch.zeros(2, 3, 12, 8, dtype=torch.float64)
    )
    assert found.images == 10


def test_an_export_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("pixels")
    export_tokenizer(tokenizer, tmp_path / "out", "torch")
    export_tokenizer(tokenizer, tmp_path / "out", "torch")
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["checked"]["tokens"] == 8 * len(tokenizer.grid) and facts["fingerprint"] == tokenizer.fingerprint()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(PathError, match="mine.txt"):
        export_tokenizer(tokenizer, tmp_path / "out", "torch")
