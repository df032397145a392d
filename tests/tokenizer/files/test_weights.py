"""Weights: headers that are wrong, values that are not finite, and tensors that are counted before they are made."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from fuzzing.mutations import unpack
from prepared import run_file
from refusals import refused
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small import make_tokenizer

from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files.errors import ConfigError, LimitError, PipelineLoadError, WeightsError
from tokenizer.files.weights import expected_weights, read_header, tensor_of
from tokenizer.files.writing import write_json


def parse_weights(data, path):
    """The tensors in `data`, the content of the safetensors file `path`."""
    position = 0

    def read(count):
        nonlocal position
        position += count
        return data[position - count : position]

    entries = read_header(read, len(data), path)
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)[position:]
    return {name: tensor_of(raw[entry.begin : entry.end], entry) for name, entry in entries.items()}


def rewritten(path, change):
    """The weights file with another header."""
    header, body = unpack(path.read_bytes())
    body = change(header, body) or body
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


CHANGES = {
    "a gap": (lambda h, b: h["bias"].update(data_offsets=[n + 4 for n in h["bias"]["data_offsets"]]), "begins"),
    "two at one place": (lambda h, b: h["bias"].update(data_offsets=h["weight"]["data_offsets"]), "begins"),
    "more bytes than tensors": (lambda h, b: b + bytes(4), "bytes of tensors"),
    "fewer": (lambda h, b: b[:-4], "bytes of tensors"),
    "a size that overflows": (lambda h, b: h["bias"].update(shape=[1 << 62, 1 << 62]), "bytes for shape"),
    "negative": (lambda h, b: h["bias"].update(shape=[-1, -128]), "has shape"),
    "true": (lambda h, b: h["bias"].update(shape=[True, 128]), "has shape"),
    "seven axes": (lambda h, b: h["bias"].update(shape=[1] * 6 + h["bias"]["shape"]), "axes"),
    "an unknown type": (lambda h, b: h["bias"].update(dtype="F4"), "'F4'"),
    "an object": (lambda h, b: h["bias"].update(dtype="O"), "'O'"),
    "a field": (lambda h, b: h["bias"].update(pickle="x"), "pickle"),
    "no dictionary": (lambda h, b: h.update(bias=3), "should have dtype"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_headers_that_are_wrong(tmp_path, name):
    path, (change, needle) = tmp_path / "model.safetensors", CHANGES[name]
    save_file({"weight": torch.zeros(4, 32), "bias": torch.zeros(128)}, path)
    assert set(parse_weights(path.read_bytes(), path)) == {"weight", "bias"}
    rewritten(path, change)
    refused(path, WeightsError, path, needle, load=lambda path: parse_weights(path.read_bytes(), path))


def test_a_tensor_that_stands_twice_or_too_many_of_them(tmp_path):
    path = tmp_path / "model.safetensors"
    entry = '"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}'
    for text, error, needle in [
        (f"{{{entry}, {entry}}}", WeightsError, "twice"),
        (
            json.dumps({str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(10_001)}),
            LimitError,
            "10001",
        ),
    ]:
        data = struct.pack("<Q", len(text)) + text.encode() + bytes(4)
        assert needle in refused(data, error, path, load=lambda data: parse_weights(data, path))


def test_weights_that_are_not_aligned_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(5, dtype=torch.uint8), "b": torch.randn(3, 2), "c": torch.tensor(7)}, path)
    header, body = unpack(path.read_bytes())
    text = json.dumps(header).encode()
    text += b" " * ((3 - len(text)) % 8)
    found = parse_weights(struct.pack("<Q", len(text)) + text + body, path)
    assert all(torch.equal(value, found[name]) for name, value in load_file(path).items()) and len(found) == 3


@pytest.mark.parametrize(
    ("value", "dtype", "needle"),
    [
        (9999.0, torch.float32, ""),
        (-1e4, torch.float32, "codes are below"),
        (1e30, torch.float32, "codes are below"),
        (float("nan"), torch.bfloat16, "not finite"),
        (float("-inf"), torch.float16, "not finite"),
        (1e300, torch.float64, "not finite"),  # finite there, and not here
    ],
)
def test_codes_are_finite_and_bounded(folder, value, dtype, needle):
    path = folder / "tokenizer" / "model.safetensors"
    weights = load_file(path)
    weights["quantizer.codebook"] = weights["quantizer.codebook"].to(dtype)
    weights["quantizer.codebook"][-1, -1] = value
    save_file(weights, path)
    if not needle:
        assert float(Tokenizer.from_pretrained(folder / "tokenizer").quantizer.codebook[-1, -1]) == value
    else:
        refused(folder / "tokenizer", WeightsError, path, "quantizer.codebook", needle, load=Tokenizer.from_pretrained)


def test_a_tensor_with_an_escape_in_its_name(folder):
    path = folder / "prior" / "model.safetensors"
    rewritten(path, lambda h, b: h.update({"\x1b[2J": h.pop(next(iter(h)))}))
    assert "\\x1b[2J" in refused(folder / "prior", WeightsError, path, load=Prior.from_pretrained)


def test_numbers_of_every_tensor_are_looked_at(folder):
    for part, load in (("tokenizer", Tokenizer.from_pretrained), ("prior", Prior.from_pretrained)):
        path = folder / part / "model.safetensors"
        weights = {name: value.clone() for name, value in load_file(path).items()}  # the file is written over
        for name in [name for name, value in weights.items() if value.is_floating_point()]:
            before = weights[name].flatten()[-1].clone()
            weights[name].view(-1)[-1] = float("nan")
            save_file(weights, path)
            assert "not finite" in refused(folder / part, WeightsError, path, name, load=load)
            weights[name].view(-1)[-1] = before


GREEDY = {
    "parameters": {"dim": 16384, "depth": 256, "heads": 256, "hidden": 65536},
    "too large": {"grid": {"shape": [1024, 1024], "vocab_size": 32}, "dim": 16384, "heads": 1, "depth": 1},
    "at most 64": {"grid": {"shape": [1] * 65, "vocab_size": 32}},
}


def measure(good: str, *folders: str) -> None:
    """By how many MiB the most memory of this process grows, which is a fork and begins with what it has, how many
    seconds it takes, and what is said, of each folder that is refused."""
    Prior.from_pretrained(good)  # what is imported late is not counted
    for folder in folders:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            Prior.from_pretrained(folder)
        except PipelineLoadError as error:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(grown / 1024, time.process_time() - start, error)


def test_a_small_config_can_not_ask_for_much(good, tmp_path):
    """Sizes are each allowed, and not together."""
    for number, changes in enumerate(GREEDY.values()):
        folder = Path(shutil.copytree(good / "prior", tmp_path / str(number)))
        write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)
    folders = [str(tmp_path / str(number)) for number in range(len(GREEDY))]
    told = run_file(__file__, good / "prior", *folders).splitlines()
    lines = [line for line in told if line[:1].isdigit()]  # at the end, a library may tell of leaks of its own
    assert len(lines) == len(GREEDY)
    for line, needle in zip(lines, GREEDY, strict=True):
        grown, seconds, message = line.split(" ", 2)
        assert float(grown) < 100 and float(seconds) < 2 and needle in message and "config.json" in message, line


class Greedy(torch.nn.Module):
    """A table, or layers, that no weights account for."""

    def __init__(self, table=0, layers=0):
        super().__init__()
        self.register_buffer("table", torch.zeros(table, device="cpu"), persistent=False)
        self.layers = [torch.nn.Linear(1, 1) for _ in range(layers)]


@pytest.mark.parametrize(
    ("sizes", "error", "needle"),
    [
        ({"table": 1 << 20, "layers": 100}, None, ""),
        ({"table": 1 << 40}, LimitError, "tables of"),
        ({"layers": 100_000}, LimitError, "layers"),
        ({"table": -1}, ConfigError, "no model has this configuration"),
    ],
)
def test_tables_and_layers_are_counted_before_they_are_made(sizes, error, needle):
    path = Path("config.json")
    if error is None:
        assert expected_weights(lambda: Greedy(**sizes), path) == {}
    else:
        refused(path, error, "config.json: ", needle, load=lambda path: expected_weights(lambda: Greedy(**sizes), path))


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    """safetensors has one of its own, which no command knows."""

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("tokenizer.files.weights.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        make_tokenizer("vqvae").save_pretrained(tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


if __name__ == "__main__":
    measure(*sys.argv[1:])
