"""Small good folders of every part that a pipeline or a resume state may have, and what is looked at in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fuzzing.hostility import Case, Tree, read_tree
from small import make_prior, make_tokenizer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pipelines import ImagePipeline
from pipelines.training.checkpoints.states import save_state


def save_pipeline(
    folder: Path, tokenizer_name: str, prior_name: str, *, background: str = "", classes: int = 3, **more: Any
) -> None:
    """With a picture and provenance; with a `background`, also a calibration."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(tokenizer_name, (8, 8), 1, **more).eval()
    grid = tokenizer.grid
    facts = {"num_classes": classes, "tokenizer": tokenizer.fingerprint()}
    prior = make_prior(prior_name, grid.shape, grid.vocab_size, **facts)
    sampler = {"steps": 2} if prior_name == "masked" else {"temperature": 0.9, "top_k": 5}
    pipe = ImagePipeline(tokenizer, prior, labels=["cat", "dog", "eel"][:classes], sampler=sampler)
    pipe.provenance = {"data": {"source": "digits"}, "prior": {"steps": 3, "minutes": 0.5, "evaluation": {"psnr": 3.0}}}
    if background:
        pipe.set_background(make_prior(background, grid.shape, grid.vocab_size, **facts))
        pipe.calibrate(torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8))
    pipe.save_pretrained(folder, sample_grid=pipe.sample_picture(3))


def pipelines(folder: Path) -> dict[str, Tree]:
    """By name, as trees."""
    save_pipeline(folder / "plain", "vqvae", "gpt", widths=(8,))
    save_pipeline(
        folder / "likely",
        "vqvae",
        "masked",
        classes=0,
        widths=(8,),
        quantizer={"kind": "fsq", "levels": (4, 3)},
        likelihood={"kind": "discretized_logistic"},
    )
    save_pipeline(folder / "full", "vit", "marginal", background="marginal")
    save_pipeline(folder / "pixels", "pixels", "pixelcnn")
    return {path.name: read_tree(path) for path in sorted(folder.iterdir())}


def part_of(trees: dict[str, Tree], part: str) -> dict[str, Tree]:
    """One model of each pipeline."""
    return {
        name: {key.removeprefix(part): data for key, data in tree.items() if key.startswith(part)}
        for name, tree in trees.items()
    }


def check_pipeline(case: Case, pipe: ImagePipeline, good: dict[str, Tree]) -> str:
    """What is wrong with a pipeline that was loaded: only with a manifest that fits may anything differ; it works, and
    what is saved of it can be loaded again."""
    if not case.sealed and case.changed(good):
        return "the damage was not noticed"
    if not repr(pipe).isprintable():
        return f"repr: {pipe!r}"
    if case.number % 4 == 0:
        pipe.prior.grid.check(pipe(1, seed=0, progress=False, output_type="pt").tokens)
    if case.number % 16 == 0:
        pipe.save_pretrained("saved")
        ImagePipeline.from_pretrained("saved")
    return ""


def make_net() -> tuple[nn.Module, nn.Module, dict[str, torch.optim.Optimizer]]:
    """What a resume state is loaded into."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return net, AveragedModel(net, use_buffers=True), {"model": torch.optim.AdamW(net.parameters(), lr=0.01)}


def states(folder: Path) -> dict[str, Tree]:
    """A resume state after one step."""
    net, average, optimizers = make_net()
    net(torch.randn(5, 3)).square().sum().backward()
    optimizers["model"].step()
    path = save_state(folder, 1, model=net, ema=average, optimizers=optimizers, counters={"skipped": 0})
    return {"state": read_tree(path)}
