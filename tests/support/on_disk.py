"""What is asked of the files in `tests/fixtures/on_disk`, when they are written and for ever after.

`tests/fixtures/write.py` writes them and keeps the answers; `test_on_disk.py` loads them and asks again.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from contextlib import chdir, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from launch import CLOCK, ROOT, free_port
from one_process import begin_anew
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pipelines import ImagePipeline
from pipelines.__main__ import main
from tokenizer import Tokenizer

FOLDER = ROOT / "tests" / "fixtures" / "on_disk"
CLASSES = ["blob", "stripes"]
Answers = dict[str, Tensor]


# Images


def images(channels: int = 1) -> Tensor:
    """uint8 `(64, C, 8, 8)`, blobs and stripes by turns."""
    return load_file(FOLDER / "images.safetensors")["grey" if channels == 1 else "colour"]


def labels(count: int) -> list[int]:
    """The classes of the first images."""
    return [index % len(CLASSES) for index in range(count)]


def write_image_folder(folder: Path) -> None:
    """The grey images as PNG files: 48 in `train`, 16 in `test`, a folder for each class."""
    for index, pixels in enumerate(images().numpy()):
        path = folder / ("train" if index < 48 else "test") / CLASSES[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0]).save(path)


def place(folder: Path, *names: str) -> Path:
    """A folder to work in: the images, and copies of these parts of the fixtures, each by its last name."""
    write_image_folder(folder / "images")
    for name in names:
        shutil.copytree(FOLDER / name, folder / Path(name).name)
    return folder


# Verbs


def smalti(folder: Path, verb: str, *argv: str) -> str:
    """Run a verb in this process, as if started in the folder; returns what it prints."""
    begin_anew()
    printed = io.StringIO()
    with chdir(folder), redirect_stdout(printed):
        main([verb, *argv])
    return printed.getvalue()


def dry_run(preset: str) -> str:
    """What the preset's verb prints that it would do."""
    printed = io.StringIO()
    with suppress(SystemExit), redirect_stdout(printed):
        main([f"train_{preset.partition('/')[0]}", "--config", preset, "--dry-run"])
    return printed.getvalue()


def two_sharded_processes(verb: str, argv: list[str]) -> list[str]:
    """The documented command of two processes on the CPU that share the weights out."""
    machine = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    fsdp = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", *machine]
    return ["accelerate", "launch", *fsdp, "--main_process_port", str(free_port()), "-m", f"pipelines.{verb}", *argv]


def paths_for_processes() -> str:
    """PYTHONPATH of a process that starts in another folder than the project's."""
    return os.pathsep.join([str(ROOT), str(ROOT / "tests")])


# What is asked


def answers_of_tokenizer(tokenizer: Tokenizer) -> Answers:
    """Ids of fixed images, 8-bit images of these ids and of others, and the likelihood of pixels where there is one."""
    pixels = images(tokenizer.image_shape[0])[:8]
    batch, grid = pixels.float() / 127.5 - 1, tokenizer.grid
    with torch.no_grad():
        ids = torch.cat([tokenizer.encode(image) for image in batch.split(1)])
        others = (torch.arange(4 * len(grid)) * 7919 % grid.vocab_size).reshape(4, *grid.shape)
        decoded = tokenizer.decode(torch.cat([ids, others]))
        found = {"ids": ids.int(), "decoded": ((decoded + 1) * 127.5).round().to(torch.uint8)}
        if tokenizer.has_likelihood:
            found["pixel log-probabilities"] = tokenizer.pixel_log_prob(batch, ids)
    return found


def answers_of_pipeline(pipe: ImagePipeline) -> Answers:
    """Those of its tokenizer; log-probabilities of images given their class and without, and samples of a seed."""
    pixels = images(pipe.tokenizer.image_shape[0])[:8]
    found = answers_of_tokenizer(pipe.tokenizer)
    found["log-probabilities"] = pipe.log_prob(pixels)
    found["log-probabilities given the class"] = pipe.log_prob(pixels, labels(8))
    if pipe.tokenizer.has_likelihood:
        found["bits per dim"] = pipe.bits_per_dim(pixels)
    for name, options in samplings(pipe).items():
        out = pipe(output_type="pt", progress=False, **options)
        found[f"{name} samples"] = out.tokens.int()
        found[f"{name} sampled images"] = ((out.images + 1) * 127.5).round().to(torch.uint8)
    return found


def samplings(pipe: ImagePipeline) -> dict[str, dict[str, Any]]:
    """Arguments of sampling: plain, with all settings, and what only some priors take."""
    everything = {"guidance_scale": 1.5, "temperature": 0.9, "top_k": 5, "top_p": 0.95}
    found: dict[str, dict[str, Any]] = {
        "plain": {"num_images": 6, "seed": 3},
        "guided": {"labels": labels(6), "seed": 4, **everything},
    }
    if pipe.prior.name == "masked":
        found["stepwise"] = {"num_images": 6, "seed": 5, "steps": 3}
    if pipe.prior.any_order:
        order = "snake" if pipe.tokenizer.placed else "random:1"
        found[order] = {"num_images": 6, "seed": 6, "order": order}
    return found


def answers_of_calibration(pipe: ImagePipeline) -> Answers:
    """Scores and p-values, by each method that was calibrated, of images that it was not calibrated with; the map."""
    assert pipe.calibration is not None
    new = images()[48:]
    found = {"map": pipe.anomaly_map(new[:4])}
    for method in pipe.calibration.scores:
        found[f"{method} scores"] = pipe.anomaly_score(new, method)
        found[f"{method} p-values"] = pipe.anomaly_score(new, method, p_values=True)
    return found


def figures_after(run: Path, step: int) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` after a step, without what a clock says."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines if line["step"] > step]


def pixels_of(folder: Path) -> dict[str, np.ndarray]:
    """The images below a folder, by their names in it."""
    files = sorted(path for path in folder.rglob("*.png"))
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in files}
