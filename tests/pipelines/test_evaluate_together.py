"""`smalti evaluate` in one, two and three processes: the same figures and pictures, said once; an error ends all.

Each process is `python test_evaluate_together.py OUT FAULTY KEY=VALUE ...`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from givens.striped_sets import write_set
from processes import run_ranks
from small_pipelines import make_pipeline

from pipelines import evaluate as evaluation
from pipelines.images import dataset
from pipelines.metrics import fid, likelihood, quality, reconstruction, samples
from pipelines.metrics.fid import Inception
from pipelines.processes.group import ProcessGroup

SHAPE = (8, 8)
REFERENCES = 60  # training images that are decoded, of 96
CLOCK = "samples_per_second"
SHARED = {
    "fid",
    "rfid",
    "inception_score",
    "frechet_distance",
    "marginal_bits_per_token",
    "class_agreement",
    "bits_per_dim",
    "ssim",
}


# In the processes


def few_at_a_time(out: Path, rank: int) -> None:
    """Small parts, so that there are several for each process; a small network for Inception; and who does how many of
    them is written down."""
    for owner in (quality, samples, evaluation, fid):
        owner.AT_A_TIME = 16  # type: ignore[attr-defined]
    samples.DRAWN, likelihood.LOGITS, reconstruction.EVALUATED_PIXELS = 5, 1 << 15, 16 * 64
    dataset.CHUNK, evaluation.MOST_TRAINING = 8, REFERENCES
    evaluation.load_inception = lambda weights, reference, device: (  # type: ignore[assignment]
        Inception(as_inception, device, reference) if weights else None
    )
    mine, shares, decode = ProcessGroup.mine, [], dataset.decode_in_threads
    decoded = out.with_name(f"{out.name}.{rank}.decoded")

    def counted(group: ProcessGroup, items: Any) -> Any:
        found = mine(group, items)
        shares.append((len(items), len(found)))
        out.with_name(f"{out.name}.{rank}.json").write_text(json.dumps(shares))
        return found

    def noted(payloads: Any, shape: Any) -> Any:
        with decoded.open("a") as file:
            file.writelines(f"{payload}\n" for payload in payloads)
        return decode(payloads, shape)

    ProcessGroup.mine, dataset.decode_in_threads = counted, noted  # type: ignore[method-assign, assignment]
    if rank:  # the first alone trains the classifier, prints and writes
        quality.train_classifier = evaluation.publish = None  # type: ignore[assignment]


def as_inception(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits of 8-bit images `(B, 3, H, W)`."""
    rows = pixels.float().flatten(1) / 50
    chance = torch.Generator().manual_seed(0)
    features = (rows @ torch.randn(rows.shape[1], 24, generator=chance)).relu()
    return features, features @ torch.randn(24, 10, generator=chance) / 50


def failing(rank: int) -> None:
    """The second process fails in the midst of its part."""
    if rank == 1:

        def ssim(*_: Any) -> None:
            raise RuntimeError("a fault that was planted")

        reconstruction.ssim = ssim  # type: ignore[assignment]


def main(out: Path, faulty: str, argv: list[str]) -> None:
    rank = int(os.environ.get("RANK", "0"))
    few_at_a_time(out, rank)
    if faulty == "true":
        failing(rank)
    evaluation.main(argv)


# From outside


@dataclass
class Found:
    """Where results lie, and of each run the exit codes and what was printed."""

    folder: Path
    world: int
    runs: dict[str, tuple[list[int], str]]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request, tmp_path_factory) -> Found:
    folder, world = tmp_path_factory.mktemp("together"), request.param
    config = write_set(folder / "images", SHAPE, per_class=24)
    sizes = {"quantizer": {"kind": "vq", "codes": 300, "dim": 4}, "likelihood": {"kind": "categorical"}}  # two bytes
    pipe = make_pipeline("vqvae", "masked", size=SHAPE, labels=[], sizes=sizes, num_classes=2)
    pipe.provenance = {"data": config.model_dump(mode="json")}
    pipe.save_pretrained(folder / "pipeline")
    (folder / "weights.pth").touch()
    argv = [f"pipeline={folder}/pipeline", "feature_steps=2", "num_images=70", "update_card=false"]
    inception = [f"inception_weights={folder}/weights.pth", "reference=train"]

    def run(name: str, world: int, *more: str) -> tuple[list[int], str]:
        out, faulty = folder / name, str(name == "fault").lower()
        return run_ranks([__file__, str(out), faulty, *argv, f"out={out}", *more], world)

    runs = {name: run(name, 1 if name == "alone" else world, *inception) for name in ("alone", "group", "fault")}
    runs |= {"bounded": run("bounded", world), "device": run("device", world, "device=cuda")}
    return Found(folder, world, runs)


def figures_of(out: Path) -> dict[str, Any]:
    figures = json.loads((out / "evaluation.json").read_text())
    assert figures.pop(CLOCK) > 0
    return figures


def test_several_find_what_one_finds(found):
    folder, (codes, printed) = found.folder, found.runs["group"]
    out, expected = folder / "group", figures_of(folder / "alone")
    assert codes == [0] * found.world and found.runs["alone"][0] == [0], printed
    figures = figures_of(out)
    numbers = {name: value for name, value in expected.items() if isinstance(value, int | float)}
    near = {name: pytest.approx(value, rel=1e-6, abs=1e-9) for name, value in numbers.items()}
    assert figures == {**expected, **near} and set(figures) >= SHARED
    for name in ("samples", "reconstructions", "nearest"):
        assert (out / f"{name}.png").read_bytes() == (folder / "alone" / f"{name}.png").read_bytes()
    assert printed.count("Frechet distance [") == 1


def test_the_work_is_shared(found):
    """All have the same lists, and of each list every process does its part, and all of it is done."""
    folder, world = found.folder, found.world
    shares = [json.loads((folder / f"group.{rank}.json").read_text()) for rank in range(world)]
    assert len({len(each) for each in shares}) == 1 and len(shares[0]) > 20
    for each in zip(*shares, strict=True):
        assert {items for items, _ in each} == {sum(done for _, done in each)}
        assert max(done for _, done in each) - min(done for _, done in each) <= 1
    assert sum(items for items, _ in shares[0]) > 2 * len(shares[0])


def test_each_image_is_decoded_by_one_process_and_most_training_images_by_none(found):
    folder, world = found.folder, found.world
    mine = [(folder / f"bounded.{rank}.decoded").read_text().splitlines() for rank in range(world)]
    every = [path for paths in mine for path in paths]
    assert len(every) == len(set(every)) == REFERENCES + 48
    assert sum("/train/" in path for path in every) == REFERENCES
    assert max(map(len, mine)) - min(map(len, mine)) <= 2 * 8  # a part of each split


def test_an_error_in_one_process_ends_all(found):
    codes, printed = found.runs["fault"]
    assert codes == [1] * found.world and not (found.folder / "fault").exists()
    assert "error on process 0: process 1 failed: RuntimeError: a fault that was planted" in printed


def test_the_launcher_chooses_the_device_and_one_says_so(found):
    codes, printed = found.runs["device"]
    lines = [line for line in printed.splitlines() if line.startswith("error:")]
    assert lines == ["error: device: 'cuda': accelerate chose cpu for its processes; leave it auto"]
    assert codes[0] == 2 and all(codes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
