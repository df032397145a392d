"""What does not depend on how a CPU rounds: image k has the same ids and the same 8-bit pixels in any batch.

Kernels differ with the instruction set, the number of threads and the size of a batch, and so do the last bits of what
they give. So a process of its own looks at every tokenizer and prior under each setting, among them a CPU that is only
pretended (`other_rounding`), on which every layer depends on the batch.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import PRIORS, TOKENIZERS, make_prior, make_tokenizer
from trust import elsewhere

from pipelines import ImagePipeline
from pipelines.images.pictures import convert_images

ROOT = Path(__file__).parents[2]
ISAS, CAPABILITIES, THREADS = ("AVX2", "AVX512_CORE", ""), ("default", "avx2", "avx512"), (1, 2)
"""For oneDNN ("" is what the machine has), for ATen, and for OpenMP."""
GRID = list(itertools.product(ISAS, CAPABILITIES, THREADS))
QUICK = [pytest.param(("AVX2", "avx2", 2), marks=pytest.mark.slow), ("", "pretended", 1)]
SIZES = (((12, 8), 3), ((28, 28), 1))
IMAGES, FEW = 13, 7  # with -m slow, and by default: whole batches, and a rest
BATCHES = (1, 3)  # beside all at once


def run_with(isa: str, capability: str, threads: int, *what: str) -> Any:
    """What this file, run as a command, tells in a process with these settings."""
    settings = {"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": str(threads)}
    settings["OMP_WAIT_POLICY"] = "passive"  # a thread that waits leaves its core to the other tests
    settings = {name: value for name, value in settings.items() if value not in ("", "pretended")}
    path = os.environ["PYTHONPATH"]
    kept = {name: value for name, value in os.environ.items() if name not in ("ONEDNN_MAX_CPU_ISA", "SMALTI_ROUNDING")}
    command = [sys.executable, __file__, *what]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**kept, **settings, "PYTHONPATH": path}
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def look(isa: str, capability: str, threads: int, images: int) -> dict[str, int]:
    """What `found` finds in a process with these settings."""
    found: dict[str, int] = run_with(isa, capability, threads, capability, str(images))
    print(f"oneDNN {isa or 'as it is'}, ATen {capability or 'as it is'}, {threads} threads: {found}")
    return found


def check(found: dict[str, int], images: int) -> None:
    """Something was looked at, and nothing that is promised turned."""
    assert found["images"] >= 35 * images and found["samples"] >= 20 * images
    assert found["ids"] == found["bytes"] == found["floats"] == found["tokens"] == 0


@pytest.mark.parametrize("setting", QUICK, ids=str)
def test_an_image_does_not_depend_on_its_batch(setting):
    found = look(*setting, FEW)
    check(found, FEW)
    if setting[1] == "pretended":
        assert found["floats of a layer"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_image_does_not_depend_on_its_batch_under_any_setting():
    for setting in GRID:
        found = look(*setting, IMAGES)
        check(found, IMAGES)
        assert found["ids"] == found["bytes"] == found["tokens"] == 0, setting


# Streams

OTHER = [("SSE41", "default", 2), pytest.param(("AVX2", "avx2", 1), marks=pytest.mark.slow)]
"""Settings under which a stream is read that was made as this process is."""


@pytest.mark.parametrize("setting", OTHER, ids=str)
def test_a_stream_gives_the_same_tokens_and_pixels_to_within_a_grey_level(setting, tmp_path):
    pytest.importorskip("constriction")
    pipe = pipeline_of("vqvae", (28, 28), 3)
    images = torch.rand(12, 3, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pipe.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "stream").write_bytes(pipe.compress(images, progress=False))
    told = run_with(*setting, "stream", str(tmp_path))
    tokens, pixels = pipe.encode(images), pipe.decode(pipe.encode(images), output_type="np")
    assert told["tokens"] == tokens.tolist()
    off = np.abs(np.array(told["pixels"], dtype=np.int16) - pixels.astype(np.int16))
    print(f"{setting}: {(off > 0).sum()} of {off.size} pixels are off")
    assert off.max() <= 1 and pixels.max() - pixels.min() > 50


def read_stream(folder: Path) -> dict[str, Any]:
    """The tokens that a stream decodes to here, and its pixels."""
    pipe = ImagePipeline.from_pretrained(folder / "pipeline")
    seen: list[torch.Tensor] = []
    decode = pipe.tokenizer.decode
    pipe.tokenizer.decode = lambda tokens: seen.append(tokens) or decode(tokens)
    pixels = pipe.decompress((folder / "stream").read_bytes(), output_type="np", progress=False)
    return {"tokens": torch.cat(seen).tolist(), "pixels": pixels.tolist()}


# Elsewhere


def test_recorded_bits_are_looked_up_and_compared(tmp_path):
    """Rows of other machines are no promise, so that none is compared with this one here, as
    `benchmarks.trust.rounding elsewhere=here` does. Each setting has its row, and each difference is told."""
    rows = elsewhere.read_table()
    assert len({elsewhere.key_of(row) for row in rows}) == len(rows) >= len(elsewhere.SETTINGS)
    first, mine = rows[0]["bits"], elsewhere.machine()
    assert all(row["machine"].keys() == mine.keys() for row in rows) and mine["threads"] == torch.get_num_threads()
    for row in rows:
        assert len(row["bits"]["tokenizer"]["losses"]) == len(row["bits"]["prior"]["losses"]) == elsewhere.STEPS
        ids, pixels = (elsewhere.unpacked(row["bits"][part]) for part in ("ids", "bytes"))
        assert len(ids) == len(pixels) == elsewhere.SAMPLES and ids.max() > 50 and np.ptp(pixels) > 200
        assert elsewhere.differences(row["bits"], row["bits"]) == {}
    other = copy.deepcopy(first)
    other["prior"]["losses"][6] = (float.fromhex(first["prior"]["losses"][6]) * 1.25).hex()
    other["tokenizer"]["weights"] = "0"
    floats = elsewhere.unpacked(first["floats"]).copy()
    floats[0, 0, 0, 0] += 0.5
    other["floats"] = elsewhere.packed(floats)
    assert elsewhere.differences(other, first) == {
        "weights of the tokenizer": "differ after 50 steps",
        "losses of the prior": "from step 7 on, by up to 2.5e-01 of the loss",
        "floats": f"1 of {floats.size} floats of 2 images, by up to 0.5",
    }
    mine = {"machine": {**rows[0]["machine"], "threads": 99}, "bits": other}
    elsewhere.write_table(elsewhere.merged(rows, [mine, rows[0]]), tmp_path / "table.json")
    assert elsewhere.read_table(tmp_path / "table.json") == [*rows, mine]


@pytest.mark.slow
def test_a_run_here_is_the_same_twice(capsys):
    """In two processes, to the bit: what a row says is no accident."""
    one, two = elsewhere.told_by({}, 1), elsewhere.told_by({}, 1)
    assert one == two
    for row in elsewhere.read_table():
        if elsewhere.key_of(row) == elsewhere.key_of(one):
            with capsys.disabled():
                print("\nthis machine's row:", elsewhere.differences(one["bits"], row["bits"]) or "the same")


# In a process with such a setting


@torch.no_grad()
def found(count: int) -> dict[str, int]:
    """How many images and samples were looked at, and how many ids, 8-bit pixels, float pixels and sampled tokens came
    out otherwise in one batch than in another; and how many floats do where the tokenizer is given whole batches."""
    counts = dict.fromkeys(("images", "samples", "ids", "bytes", "floats", "tokens", "floats of a layer"), 0)
    for name, (size, channels) in itertools.product(TOKENIZERS, SIZES):
        pipe = pipeline_of(name, size, channels)
        images = torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
        ids, pixels = pipe.encode(images), pipe.decode(pipe.encode(images), output_type="pt")
        for batch in BATCHES:
            parts = list(zip(images.split(batch), ids.split(batch), strict=True))
            decoded = torch.cat([pipe.decode(tokens, output_type="pt") for _, tokens in parts])
            counts["images"] += len(images)
            counts["ids"] += int((torch.cat([pipe.encode(some) for some, _ in parts]) != ids).sum())
            counts["floats"] += int((decoded != pixels).sum())
            counts["bytes"] += int((convert_images(decoded, "np") != convert_images(pixels, "np")).sum())
            whole = torch.cat([pipe.tokenizer.decode(tokens) for _, tokens in parts])
            counts["floats of a layer"] += int((whole != pixels).sum())
    for name in PRIORS:
        prior = make_prior(name, (4, 5), 8)
        one = torch.cat([drawn(prior, k, 1) for k in range(count)])
        for options in ({}, {"cache": False}, {"parallel": True}):
            counts["samples"] += count
            counts["tokens"] += int((drawn(prior, 0, count, **options) != one).sum())
    return counts


def pipeline_of(name: str, size: tuple[int, int], channels: int) -> ImagePipeline:
    """A small tokenizer, and a prior that costs nothing."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(name, size, channels).eval()
    if name == "palette":  # which is nothing but statistics of images
        tokenizer.initialize(torch.rand(64, channels, *size) * 2 - 1)
    grid = tokenizer.grid
    return ImagePipeline(tokenizer.eval(), make_prior("marginal", grid.shape, grid.vocab_size))


def drawn(prior, first: int, count: int, **options) -> torch.Tensor:
    """Tokens of the images from `first` on, each with its own noise."""
    generators = [torch.Generator().manual_seed(first + k) for k in range(count)]
    return prior.sample(count, generator=generators, **options)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if sys.argv[1] == "pretended":
        from pretended import other_rounding

        other_rounding.install()
    print(json.dumps(read_stream(Path(sys.argv[2])) if sys.argv[1] == "stream" else found(int(sys.argv[2]))))
