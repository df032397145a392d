"""Whole runs on the GPU: bf16, compiled, resumed, on two GPUs; their syncs and their memory."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launch import EMA, ROOT, VQVAE, dotted, environment, losses, make_tokens, prior_arguments, train_prior, train_stage
from small import grid_of

from pipelines.commands import plan
from pipelines.config.command import parse
from pipelines.processes.launch import build_accelerator
from pipelines.train_prior import PriorTask, TrainPriorConfig
from pipelines.training.blocks import prepare_blocks
from pipelines.training.trainer import Trainer
from prior import Prior
from prior.cuda_graph import Graph
from tokenizer import Tokenizer
from tokenizer.precision import full_float32

pytestmark = pytest.mark.gpu
STAGES = ["train_tokenizer", "train_prior"]
CONFIGS = ROOT / "configs"
COMPILED = sorted(path for path in CONFIGS.glob("[pt]*/*.yaml") if "\n  compile: true\n" in path.read_text())
if not torch.cuda.is_available():  # most take minutes
    COMPILED = [path for path in COMPILED if path.stem in ("gpt_cifar10", "vqvae_cifar10")]
CRITIC = {"critic.weight": 0.5, "critic.start": 0, "critic.warmup": 0, "critic.ramp": 0, "critic.layers": 1}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("tokens") / "tokens")


@pytest.fixture
def bf16(monkeypatch) -> None:
    """Mixed precision, as with `accelerate launch --mixed_precision bf16`."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_in_bf16_learns_and_resumes(stage, tokens, tmp_path, bf16):
    """GPU sums are not ordered, so losses after the resume agree only approximately."""
    train_stage(stage, tmp_path / "whole", tokens, train__steps=24, train__preview_every=12, train__evaluate_every=12)
    found = losses(tmp_path / "whole")
    assert len(found) == 24 and sum(found[-5:]) < sum(found[:5])
    for _ in range(2):
        train_stage(stage, tmp_path / "parts", tokens, train__steps=24, train__save_every=16)
        shutil.rmtree(tmp_path / "parts" / "state" / "step-00000024")
    assert losses(tmp_path / "parts") == pytest.approx(found, rel=0.03)


@pytest.mark.timeout(1200)  # vqgan compiles 22 graphs in one process
@pytest.mark.parametrize("path", COMPILED, ids=lambda path: path.stem)
def test_a_preset_compiles(path, device, compiler):
    """At full width with two blocks: compiled outputs agree with eager ones in float32, and bf16 gradients are finite.
    The CPU does not compile."""
    outputs = []
    for compiled in (False, device.type == "cuda"):
        torch.manual_seed(0)
        net, batch = preset_of(path, device)
        if compiled:
            config = parse(TrainPriorConfig, ["out=x", "tokens=x", "train.compile=true"], verb="v", description="")
            prepare_blocks([net], config.train)
        call = net.decode if hasattr(net, "decode") else net
        with full_float32(), torch.no_grad():
            outputs.append(call(batch))
    assert float((outputs[1] - outputs[0]).abs().max()) < 1e-3 * float(outputs[0].abs().max())
    with torch.autocast(device.type, torch.bfloat16):
        call(batch).float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


def preset_of(path: Path, device: torch.device) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model of a preset with depth 2, and tokens as input of a prior or a decoder."""
    preset = yaml.safe_load(path.read_text())
    model = {key: 2 if key == "depth" else value for key, value in preset["model"].items()}
    kind = model.pop("kind")
    if path.parent.name == "prior":
        net: Any = Prior.create(kind, grid=grid_of(kind, (16, 16), 1024), num_classes=10, **model)
    else:
        size, channels = (preset["data"].get(name, default) for name, default in (("image_size", 256), ("channels", 3)))
        net = Tokenizer.create(kind, image_size=(size, size), channels=channels, **model)
    return net.to(device).eval(), torch.randint(net.grid.vocab_size, (2, *net.grid.shape), device=device)


WITHOUT_REVIVAL = {"model": {**VQVAE, "quantizer": {**EMA, "revive_every": 1000}}}  # reviving reads code counts


@pytest.mark.parametrize(
    ("stage", "more"), [("train_prior", {}), ("train_tokenizer", {}), ("train_tokenizer", CRITIC)], ids=str
)
def test_the_host_waits_for_nothing_between_logged_steps(stage, more, tokens, tmp_path, bf16, monkeypatch):
    """torch raises an error at any sync, from the copy of a batch to the averaging of weights."""
    take_step, batches, steps = Trainer.take_step, Trainer.batches, []

    def without_syncs(trainer: Trainer, act: Callable[[], Any]) -> Any:
        strict = trainer.device.type == "cuda" and 3 <= trainer.step < 18  # kernels are selected by then
        torch.cuda.set_sync_debug_mode("error") if strict else None
        try:
            return act()
        finally:
            torch.cuda.set_sync_debug_mode("default") if strict else None

    def strict_step(trainer: Trainer, *rest: Any) -> None:
        without_syncs(trainer, lambda: take_step(trainer, *rest))
        steps.append(trainer.step)

    def strict_batches(trainer: Trainer) -> Iterator[Any]:
        with closing(batches(trainer)) as stream:
            while True:
                yield without_syncs(trainer, lambda: next(stream))

    monkeypatch.setattr(Trainer, "take_step", strict_step)
    monkeypatch.setattr(Trainer, "batches", strict_batches)
    settings = {"train__steps": 20, "train__log_every": 20, "train__preview_every": 20}
    more = {**WITHOUT_REVIVAL, **more} if stage == "train_tokenizer" else more
    train_stage(stage, tmp_path / "run", tokens, **settings, **more)
    assert steps == list(range(1, 21)) and len(losses(tmp_path / "run", "learning_rate")) == 1


def test_previews_leave_no_graph(tokens, tmp_path, bf16, graphs):
    train_prior(tmp_path / "run", tokens, train__steps=4, train__preview_every=2)
    assert Graph.last is None and not graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_agrees_with_the_plan(tokens, tmp_path, bf16):
    """Within 5 %, for a GPT that fills a few gigabytes, without the memory of earlier tests."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = {"kind": "gpt", "dim": 1024, "depth": 8, "heads": 16}
    argv = prior_arguments(tmp_path / "run", tokens, model=model, train__batch_size=72)
    planned = plan.main([*argv, "batches=8,16"])
    config = parse(TrainPriorConfig, argv, verb="train_prior", description="")
    trainer = Trainer(PriorTask(config), config.model_copy(update={"out": str(tmp_path)}), build_accelerator())
    with closing(trainer.batches()) as stream:
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            trainer.take_step(next(stream), 1e-4)
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated() - before
    trainer.close()
    assert found == pytest.approx(planned.memory(72), rel=0.05)


@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("config", ["two_gpus.yaml", "fsdp.yaml"])
def test_two_cards_train_as_one_and_continue(config, tokens, tmp_path, bf16):
    train_prior(tmp_path / "one", tokens, train__steps=10)
    launch = f"{sys.executable} -m accelerate.commands.launch --config_file {CONFIGS / 'accelerate' / config}"
    clean = {key: value for key, value in environment().items() if key != "ACCELERATE_USE_CPU"}
    for steps in (6, 10):
        argv = prior_arguments(tmp_path / "two", tokens, **dotted({"train__steps": steps, "train__save_every": 3}))
        command = [*launch.split(), "--num_processes", "2", "-m", "pipelines.train_prior", *argv]
        done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0 and "2 processes on cuda" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0.05)
