"""The training loop, on runs of a second: its pure functions, its guards, and what it leaves on disk.

Covers: pipelines/train_prior.py, pipelines/train_tokenizer.py, pipelines/training/progress.py,
pipelines/training/reporting.py, pipelines/training/saving.py, pipelines/training/schedule.py,
pipelines/training/starting.py, pipelines/training/state.py, pipelines/training/step.py, pipelines/training/task.py.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from launch import (
    EMA,
    GPT,
    VQVAE,
    assert_equal_tensors,
    exact,
    losses,
    make_tokens,
    metrics,
    prior_arguments,
    states,
    tensors,
    train_prior,
    train_tokenizer,
)
from one_process import begin_anew, one_process
from PIL import Image
from safetensors.torch import load_file
from small import PRIORS, SMALL, TOKENIZERS, make_tokenizer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pipelines import ImagePipeline
from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.images import DataConfig, load_images
from pipelines.metrics.likelihood import bits_per_token
from pipelines.metrics.reconstruction import evaluate_reconstruction
from pipelines.shuffling.epochs import samples_of
from pipelines.tokens import load_tokens
from pipelines.train_prior import PriorTask, TrainPriorConfig
from pipelines.train_tokenizer import Stage, TokenizerTask
from pipelines.training import loop as training
from pipelines.training import step as one_step
from pipelines.training.loop import batches
from pipelines.training.schedule import TrainConfig, ema_update, learning_rate
from pipelines.training.task import Task
from tokenizer import Tokenizer
from tokenizer.files.writing import write_manifest
from tokenizer.quantizers import Quantizer

FSQ = {"kind": "fsq", "levels": [5, 4, 3]}
QUANTIZERS = {name: {"kind": name, **SMALL.get(name, {})} for name in Quantizer.available()}


pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """A token dataset of 72 rows of 7 x 7 ids in 3 classes."""
    return make_tokens(tmp_path_factory.mktemp("tokens") / "tokens")


# The data's order


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 3), (7, 7), (5, 16), (64, 16)])
def test_every_row_comes_once_per_epoch(rows, batch_size):
    steps = 4 * rows // math.gcd(rows, batch_size)
    drawn = [samples_of(rows, batch_size, 3, step) for step in range(steps)]
    indices, epochs = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    for epoch in range(epochs[-1] + 1):
        assert sorted(indices[epochs == epoch]) == list(range(rows))
    assert (np.diff(epochs) >= 0).all()
    first, second = indices[epochs == 0], indices[epochs == 1]
    assert rows < 6 or (first != second).any()


def test_the_order_is_a_pure_function():
    wanted = {step: samples_of(50, 16, 1, step) for step in range(40)}
    for step in np.random.default_rng(0).permutation(40):  # out of order, and with caches of other runs between
        samples_of(50, 16, 2, int(step))
        assert all((a == b).all() for a, b in zip(samples_of(50, 16, 1, int(step)), wanted[step], strict=True))
    assert any((wanted[step][0] != samples_of(50, 16, 2, step)[0]).any() for step in range(4))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_shares_the_same_batches(processes, accumulate):
    task: Any = Task()
    task.rows, task.batch = 50, lambda indices, epochs, seed: (indices, epochs, seed)
    config = TrainConfig(batch_size=24, accumulate=accumulate, seed=5)
    streams = [
        batches(
            SimpleNamespace(
                step=7,
                config=config,
                task=task,
                accelerator=SimpleNamespace(num_processes=processes, process_index=rank, device=torch.device("cpu")),
            )
        )
        for rank in range(processes)
    ]
    for step in range(7, 20):
        parts = [next(stream) for stream in streams]
        laid_out = [part for micro in zip(*parts, strict=True) for part in micro]  # micro-batch by micro-batch
        indices, epochs = samples_of(50, 24, 5, step)
        assert (np.concatenate([part[0] for part in laid_out]) == indices).all()
        assert (np.concatenate([part[1] for part in laid_out]) == epochs).all()
        assert {part[2] for part in laid_out} == {5}
    for stream in streams:
        stream.close()


# The learning rate, the average, the gradients


def test_learning_rate():
    config = TrainConfig(steps=100, lr=2.0, final_lr=0.1, warmup_steps=10)
    rates = [learning_rate(config, step, step / 100) for step in range(130)]
    assert rates[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)])
    assert rates[50] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert all(a > b for a, b in zip(rates[10:100], rates[11:101], strict=True))
    assert rates[100:] == pytest.approx([0.2] * 30)  # a cosine that went on would rise again
    assert learning_rate(TrainConfig(warmup_steps=0, lr=1.0), 0, 0.0) == 1.0
    assert learning_rate(TrainConfig(warmup_steps=0, final_lr=0.0), 5, 1.0) == 0.0


def test_the_average_is_what_it_says_and_copies_buffers():
    model = nn.BatchNorm1d(3)
    averaged = AveragedModel(model, multi_avg_fn=ema_update(0.6), use_buffers=False)
    expected = model.weight.detach().double()
    for n in range(12):
        with torch.no_grad():
            model.weight.normal_()
            model.running_mean.normal_()
        averaged.update_parameters(model)
        decay = min(0.6, (1 + n) / (10 + n))
        expected = model.weight.double() if n == 0 else decay * expected + (1 - decay) * model.weight.double()
        assert torch.allclose(averaged.module.weight.double(), expected, atol=1e-6)
        assert torch.equal(averaged.module.running_mean, model.running_mean)
    assert (1 + 11) / (10 + 11) < 0.6 < (1 + 20) / (10 + 20)


def test_a_run_averages_its_weights_and_copies_its_codebook(tmp_path, monkeypatch):
    seen: list[dict[str, torch.Tensor]] = []
    take_step = training.take_step

    def watched(run, *rest):
        if not seen:
            seen.append(copy.deepcopy(run.task.model.state_dict()))
        take_step(run, *rest)
        seen.append(copy.deepcopy(run.task.model.state_dict()))

    monkeypatch.setattr(training, "take_step", watched)
    run = train_tokenizer(tmp_path / "run", train__ema_decay=0.3)
    found = load_file(states(run)[-1] / "ema.safetensors")
    buffers = {name for name, _ in Stage(make_tokenizer("vqvae"), None).named_buffers()}
    for key, start in seen[0].items():
        expected = start.double()
        for n, state in enumerate(seen[1:]):
            decay = 0.0 if n == 0 else min(0.3, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * state[key].double()
        if key in buffers:
            assert torch.equal(found[f"module.{key}"], seen[-1][key])
        else:
            assert torch.allclose(found[f"module.{key}"].double(), expected, atol=1e-6)
            assert not torch.equal(found[f"module.{key}"], seen[-1][key])
    assert {f"tokenizer.quantizer.{name}" for name in ("codebook", "counts", "sums")} <= buffers


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, tokens):
    for name, train in {
        "tokenizer": lambda out, n: train_tokenizer(out, model={**VQVAE, "quantizer": FSQ}, train__accumulate=n),
        "prior": lambda out, n: train_prior(out, tokens, train__accumulate=n),
    }.items():
        whole, parts = (losses(train(tmp_path / f"{name}{n}", n)) for n in (1, 4))
        assert len(whole) == 12 and parts == pytest.approx(whole, rel=2e-5)
        assert whole[0] != whole[-1]


def test_clipping_bounds_the_norm_that_is_applied(tmp_path, monkeypatch):
    applied = []
    inspect = one_step.agree

    def watched(run, *rest):
        gradients = [p.grad.flatten() for p in run.task.model.parameters() if p.grad is not None]
        applied.append(float(torch.cat(gradients).norm()))
        return inspect(run, *rest)

    monkeypatch.setattr(one_step, "agree", watched)
    run = train_tokenizer(tmp_path / "run", train__clip=0.05)
    assert len(applied) == 12 and max(applied) <= 0.05 * (1 + 1e-4) and max(applied) > 0.049
    assert min(losses(run, "gradient_norm")) > 0.05  # what is logged is the norm before


def test_bfloat16_trains(tmp_path, tokens, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    full = {}
    for name, train in {"tokenizer": train_tokenizer, "prior": lambda out, **m: train_prior(out, tokens, **m)}.items():
        run = train(tmp_path / name, train__steps=20)
        found = losses(run)
        assert len(found) == 20 and all(map(math.isfinite, found)) and found[-1] < 0.8 * found[0]
        assert not metrics(run)[-1]["skipped_steps"]
        full[name] = found
    assert capsys.readouterr().out.count("bf16 mixed precision") == 2
    begin_anew()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert losses(train_prior(tmp_path / "float32", tokens, train__steps=20)) != full["prior"]  # so it was used


def test_fp16_is_refused(tmp_path, monkeypatch):
    accelerator = SimpleNamespace(num_processes=1, mixed_precision="fp16")
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: accelerator)
    with pytest.raises(UserError, match="bf16"):
        train_tokenizer(tmp_path / "run")


def test_micro_batches_train_what_one_batch_does(tmp_path):
    """With codes that die and rise all the time. The first codebook is made from the first micro-batch, so both begin
    with one that is there."""
    quantizer = {**EMA, "revive_every": 2, "revive_below": 0.3}
    model = {**VQVAE, "quantizer": quantizer}
    first = train_tokenizer(tmp_path / "first", model=model, train__steps=2)
    more = {"model": model, "init": str(first / "tokenizer"), "train__steps": 12}
    one, four = (train_tokenizer(tmp_path / str(n), **more, train__accumulate=n) for n in (1, 4))
    for name in ("loss", "l2", "commitment", "codebook_usage", "codebook_perplexity", "codebook_dead"):
        assert losses(four, name) == pytest.approx(losses(one, name), rel=1e-3), name
    assert int(tensors(four / "tokenizer")["model.safetensors:quantizer.started"]) == 14


# What is not finite


def everything(run) -> dict[str, torch.Tensor]:
    """Copies of all that a step may change."""
    optimizer = run.optimizers["model"].state_dict()["state"]
    moments = {f"{index}.{name}": value for index, entry in optimizer.items() for name, value in entry.items()}
    parts = {"model": run.task.model.state_dict(), "average": run.averaged.state_dict(), "optimizer": moments}
    return {f"{part} {key}": value.clone() for part, values in parts.items() for key, value in values.items()}


def poison(monkeypatch, task, steps, how) -> None:
    """Make the loss of `task` sick at `steps`."""
    healthy = task.loss

    def loss(self, player, batch, step):
        value, terms = healthy(self, player, batch, step)
        return (how(value, self.model) if step in steps else value), terms

    monkeypatch.setattr(task, "loss", loss)


SICK = {
    "nan loss": lambda loss, model: loss * math.nan,
    "infinite loss": lambda loss, model: loss + math.inf,
    "nan gradient": lambda loss, model: loss + (next(model.parameters()) * 0).sum().sqrt(),  # the loss stays finite
}


@pytest.mark.parametrize(
    ("quantizer", "how"),
    [*itertools.product(QUANTIZERS, ["nan gradient"]), ("ema", "nan loss"), ("ema", "infinite loss")],
)
def test_a_sick_step_changes_nothing_and_is_counted(tmp_path, monkeypatch, quantizer, how):
    sick, changed = {3, 4, 8}, {}
    poison(monkeypatch, TokenizerTask, sick, SICK[how])
    take_step = training.take_step

    def watched(run, *rest):
        step, before = run.step, everything(run)
        take_step(run, *rest)
        changed[step] = [
            key for key, value in everything(run).items() if not torch.equal(value, before.get(key, value))
        ]

    monkeypatch.setattr(training, "take_step", watched)
    run = train_tokenizer(tmp_path / "run", model={**VQVAE, "quantizer": QUANTIZERS[quantizer]}, train__save_every=2)
    assert set(changed) == set(range(12)) and {step for step, keys in changed.items() if not keys} == sick
    assert metrics(run)[-1]["skipped_steps"] == 3
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2, 3, 6, 7, 8, 10, 11, 12]
    assert all(torch.isfinite(value.float()).all() for value in tensors(run).values())


def test_the_first_step_may_be_sick(tmp_path, monkeypatch):
    """k-means over images that are not numbers must not be what the codebook starts from."""
    for name in ("ema", "vq"):
        with monkeypatch.context() as patch:
            batch = TokenizerTask.batch
            calls = iter(range(100))

            def first_is_sick(self, *arguments, batch=batch, calls=calls):
                (images,) = batch(self, *arguments)
                return (images * math.nan if next(calls) == 0 else images,)

            patch.setattr(TokenizerTask, "batch", first_is_sick)
            model = {**VQVAE, "quantizer": QUANTIZERS[name]}
            run = train_tokenizer(tmp_path / name, model=model, train__save_every=1)
        assert metrics(run)[-1]["skipped_steps"] == 1 and losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize("how", SICK)
def test_ten_sick_steps_in_a_row_end_the_run(tmp_path, monkeypatch, how):
    poison(monkeypatch, TokenizerTask, set(range(2, 9)) | set(range(12, 99)), SICK[how])
    tensor = "loss" if how == "infinite loss" else r"the gradient of tokenizer.encoder\S+"
    with pytest.raises(UserError, match=rf"step 22: 10 steps in a row .* {tensor}"):
        train_tokenizer(tmp_path / "run", train__steps=40, train__save_every=4)
    kept = [path.name for path in states(tmp_path / "run")]
    assert kept == ["step-00000016", "step-00000020"]
    assert all(torch.isfinite(value.float()).all() for value in tensors(tmp_path / "run").values())
    (first, second) = (tensors(path) for path in states(tmp_path / "run"))
    assert_equal_tensors(second, first)
    with pytest.raises(UserError, match="step 22:"):  # started again, it still knows that the last eight were sick
        train_tokenizer(tmp_path / "run", train__steps=40, train__save_every=4)


# The end


def test_minutes_end_a_run(tmp_path):
    began = time.monotonic()
    run = train_tokenizer(tmp_path / "run", train__steps=None, train__minutes=0.02, train__final_lr=0.25)
    last = metrics(run)[-1]
    assert 0.02 <= last["minutes"] < 0.04 and time.monotonic() - began < 6 and last["step"] > 12
    assert last["learning_rate"] == pytest.approx(2e-3 * 0.25)  # the cosine has come to its end
    assert states(run)[-1].name == f"step-{last['step']:08d}" and "held_out/psnr" in last
    before = files(run)
    train_tokenizer(tmp_path / "run", train__steps=None, train__minutes=0.02, train__final_lr=0.25)
    assert files(run) == before


def test_steps_end_a_run_before_its_minutes(tmp_path):
    assert metrics(train_tokenizer(tmp_path / "run", train__minutes=5.0))[-1]["step"] == 12


def test_an_end_is_needed(tmp_path):
    with pytest.raises(UserError, match="train.minutes"):
        train_tokenizer(tmp_path / "run", train__steps=None)
    assert not (tmp_path / "run").exists()


# What a run leaves


def files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


EVERY = {"train__log_every": 2, "train__evaluate_every": 4, "train__preview_every": 6, "train__save_every": 5}
KEYS = {"learning_rate", "images_per_second", "tokens_per_second", "minutes", "skipped_steps", "gradient_norm", "loss"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokens) -> dict[str, Path]:
    """A finished run of each stage."""
    folder = tmp_path_factory.mktemp("runs")
    with one_process():
        return {
            "tokenizer": train_tokenizer(folder / "tokenizer", charts=True, **EVERY),
            "prior": train_prior(folder / "prior", tokens, **EVERY, sampler__guidance_scale=1.5),
        }


@pytest.mark.parametrize(
    ("stage", "own", "held_out"),
    [
        (
            "tokenizer",
            {"l1", "l2", "commitment", "codebook_usage", "codebook_perplexity", "codebook_dead"},
            {"psnr", "l1", "l2", "codebook_usage", "codebook_perplexity"},
        ),
        ("prior", {"bits_per_token"}, {"bits_per_token"}),
    ],
)
def test_metrics(runs, stage, own, held_out):
    lines = metrics(runs[stage])
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    for line in lines:
        evaluated = {f"validation/{name}" for name in held_out} if line["step"] in (4, 8, 12) else set()
        evaluated |= {f"held_out/{name}" for name in held_out} if line["step"] == 12 else set()
        assert set(line) == {"step"} | KEYS | own | evaluated
        assert all(math.isfinite(value) for value in line.values())
    if stage == "tokenizer":
        assert all(0 < line["codebook_usage"] <= 1 <= line["codebook_perplexity"] <= 16 for line in lines)
    else:
        assert all(line["bits_per_token"] == pytest.approx(line["loss"] / math.log(2)) for line in lines)
    assert all(line["tokens_per_second"] == pytest.approx(49 * line["images_per_second"]) for line in lines)
    rates = [line["learning_rate"] for line in lines]
    peak = {"tokenizer": 2e-3, "prior": 4e-3}[stage]
    assert rates[0] == pytest.approx(peak * 3 / 4) and rates[-1] == pytest.approx(0.02 * peak)


def test_a_line_is_the_mean_of_its_steps(tmp_path, runs):
    every = losses(train_tokenizer(tmp_path / "run"))
    assert losses(runs["tokenizer"]) == pytest.approx([(a + b) / 2 for a, b in zip(every[::2], every[1::2])])  # noqa: B905


@pytest.mark.parametrize(
    ("stage", "name", "size"),
    [("tokenizer", "reconstructions", 400), ("tokenizer", "codebook", 400), ("prior", "samples", 80)],
)
def test_previews_are_pictures(runs, stage, name, size):
    previews = sorted((runs[stage] / "previews").glob(f"{name}-*"))
    assert [path.name for path in previews] == [f"{name}-{step:08d}.png" for step in (0, 6, 12)]
    for path in previews:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.mode in ("L", "RGB")
            assert size <= image.width <= 2000 and 100 <= image.height <= 2000
            assert np.asarray(image).std() > 5
    assert previews[0].read_bytes() != previews[-1].read_bytes()


def test_the_tokenizer_that_is_saved_is_the_one_that_was_evaluated(runs):
    run = runs["tokenizer"]
    saved = Tokenizer.from_pretrained(run / "tokenizer")
    found = evaluate_reconstruction(saved, load_images(DataConfig(limit=72)).held_out)
    last = metrics(run)[-1]
    assert {f"held_out/{name}": value for name, value in found.items()} == {
        key: value for key, value in last.items() if key.startswith("held_out/")
    }
    average = load_file(states(run)[-1] / "ema.safetensors")
    assert_equal_tensors(
        {f"module.tokenizer.{k}": v for k, v in sorted(saved.state_dict().items())},
        {k: v for k, v in sorted(average.items()) if k.startswith("module.tokenizer.")},
    )
    facts = json.loads((run / "tokenizer" / "provenance.json").read_text())
    assert facts["tokenizer"]["steps"] == 12 and facts["data"]["limit"] == 72
    validated = {f"validation_{name}": last[f"validation/{name}"] for name in found}
    assert facts["tokenizer"]["evaluation"] == found | validated and facts["tokenizer"]["best_step"] == 12
    assert facts["tokenizer"]["images"] == {"validation": 72, "held_out": 72}


def test_the_pipeline_that_is_saved_is_the_one_that_was_evaluated(runs, tokens):
    run = runs["prior"]
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    found = bits_per_token(pipe.prior, load_tokens(tokens).splits["test"])
    assert found == metrics(run)[-1]["held_out/bits_per_token"]
    average = load_file(states(run)[-1] / "ema.safetensors")
    assert_equal_tensors(
        {f"module.{k}": v for k, v in sorted(pipe.prior.state_dict().items())},
        {k: v for k, v in sorted(average.items()) if k != "n_averaged"},
    )
    assert pipe.tokenizer.fingerprint() == load_tokens(tokens).tokenizer.fingerprint()
    assert len(pipe(num_images=2, labels=["class 1", "class 2"], seed=0, progress=False).images) == 2


def test_a_finished_run_started_again_does_nothing(runs, tokens, monkeypatch, capsys):
    before = {stage: files(run) for stage, run in runs.items()}
    monkeypatch.setattr(training, "take_step", lambda *_: pytest.fail("a step was taken"))
    train_tokenizer(runs["tokenizer"], **EVERY)
    train_prior(runs["prior"], tokens, **EVERY, sampler__guidance_scale=1.5)
    assert {stage: files(run) for stage, run in runs.items()} == before
    printed = capsys.readouterr().out
    assert printed.count("already finished: 12 steps in ") == 2 and "continuing" not in printed


def test_a_folder_of_another_configuration_is_refused(runs, tokens):
    before = {stage: files(run) for stage, run in runs.items()}
    with pytest.raises(UserError, match="nothing was overwritten") as error:
        train_tokenizer(runs["tokenizer"], **EVERY, train__lr=1e-3, model={**VQVAE, "quantizer": {**EMA, "codes": 8}})
    lines = str(error.value).splitlines()
    assert lines[1:] == ["model.quantizer.codes: 16 -> 8", "train.lr: 0.002 -> 0.001"]
    with pytest.raises(UserError, match=r"sampler.guidance_scale: 1.5 -> 1.0"):
        train_prior(runs["prior"], tokens, **EVERY)
    with pytest.raises(UserError, match="another configuration"):  # the other stage
        train_prior(runs["tokenizer"], tokens, **EVERY)
    assert {stage: files(run) for stage, run in runs.items()} == before


def test_tracking_may_change(runs):
    before = files(runs["tokenizer"])
    train_tokenizer(runs["tokenizer"], **EVERY, track__name="another", track__project="elsewhere")
    after = files(runs["tokenizer"])
    assert {name for name in after if after[name] != before.get(name)} == {"config.yaml"}
    train_tokenizer(runs["tokenizer"], **EVERY)


def test_a_run_folder_may_be_moved(tmp_path):
    train_tokenizer(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    before = files(tmp_path / "there")
    train_tokenizer(tmp_path / "there")
    after = files(tmp_path / "there")
    assert {name for name in after if after[name] != before.get(name)} <= {"config.yaml"}


@pytest.mark.parametrize("text", ["", "out: [1", "just text"])
def test_a_damaged_configuration_is_refused(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "run"))):
        train_tokenizer(tmp_path / "run")
    assert files(tmp_path / "run") == {"config.yaml": text.encode()}


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train.batch_size: 16 is not a multiple of processes x accumulate \(1 x 3\)"):
        train_tokenizer(tmp_path / "run", train__accumulate=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [2**31, 2**53])
def test_any_seed_will_do(tmp_path, tokens, seed):
    small = losses(train_prior(tmp_path / "small", tokens, train__steps=2))
    large = losses(train_prior(tmp_path / "large", tokens, train__steps=2, train__seed=seed))
    assert small != large


# Labels


def labels_of(tokens, rows, epochs, tmp_path, seed=0, **more):
    argv = prior_arguments(tmp_path / "run", tokens, **more)
    task = PriorTask(parse(TrainPriorConfig, argv, verb="train_prior", description=None))
    return task.batch(np.asarray(rows), np.asarray(epochs), seed)[1], task.train_split.labels


def test_label_dropout(tmp_path_factory, tmp_path):
    tokens = make_tokens(tmp_path_factory.mktemp("many") / "tokens", rows=4000)
    rows, zeros = np.arange(4000), np.zeros(4000, np.int64)
    for share in (0.0, 0.3, 1.0):
        found, labels = labels_of(tokens, rows, zeros, tmp_path, label_dropout=share)
        dropped = found == 3
        assert abs(float(dropped.float().mean()) - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-9
        assert torch.equal(found[~dropped], labels[~dropped])
    found, _ = labels_of(tokens, rows, zeros, tmp_path, label_dropout=0.3)
    some = np.array([7, 3999, 0, 12])  # whatever else is in the batch
    alone, _ = labels_of(tokens, some, zeros[:4], tmp_path, label_dropout=0.3)
    assert torch.equal(alone, found[some])
    for other in ({"epochs": zeros + 1}, {"epochs": zeros, "seed": 1}):
        differs, _ = labels_of(tokens, rows, tmp_path=tmp_path, label_dropout=0.3, **other)
        assert 0.3 < float(((differs == 3) != (found == 3)).float().mean()) < 0.54  # independent: 2 x 0.3 x 0.7


def test_without_labels_every_row_is_of_the_null_class(tmp_path_factory, tmp_path):
    tokens = make_tokens(tmp_path_factory.mktemp("bare") / "tokens", classes=0)
    found, labels = labels_of(tokens, [0, 1, 2], [0, 0, 0], tmp_path, label_dropout=0.3)
    assert labels is None and found.tolist() == [0, 0, 0]
    run = train_prior(tmp_path / "run", tokens, sampler__guidance_scale=1.5, train__steps=3)
    assert ImagePipeline.from_pretrained(run / "pipeline")(num_images=1, seed=0, progress=False).images


# Every model


def test_tiny_runs_learn(tmp_path, tokens):
    first = losses(train_tokenizer(tmp_path / "tokenizer", train__steps=30))
    second = losses(train_prior(tmp_path / "prior", tokens, train__steps=60))
    assert np.mean(first[-3:]) < 0.6 * np.mean(first[:3])
    assert np.mean(second[-3:]) < 0.7 * np.mean(second[:3])


def test_two_runs_are_the_same_run(tmp_path, tokens):
    model = {**GPT, "dropout": 0.2, "attention_dropout": 0.1}
    one, two = (train_prior(tmp_path / name, tokens, model=model) for name in ("one", "two"))
    assert exact(one) == exact(two)
    assert_equal_tensors(tensors(states(two)[-1]), tensors(states(one)[-1]))


def node_of(name: str) -> dict:
    return {"kind": name, **SMALL.get(name, {})}


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_trains(tmp_path, tokens, name):
    run = train_prior(tmp_path / "run", tokens, model=node_of(name), train__steps=3, train__save_every=2)
    assert len(losses(run)) == 3 and all(map(math.isfinite, losses(run)))
    assert not metrics(run)[-1]["skipped_steps"]
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    held_out = bits_per_token(pipe.prior, load_tokens(tokens).splits["test"])
    assert pipe.prior.name == name and held_out == metrics(run)[-1]["held_out/bits_per_token"]


def trained(name: str) -> bool:
    return any(parameter.requires_grad for parameter in make_tokenizer(name, (28, 28), 1).parameters())


def start_of(name: str, folder: Path) -> dict[str, str]:
    """What a tokenizer that is made of another one starts from."""
    return {"init": str(train_tokenizer(folder, model=node_of("klvae")) / "tokenizer")} if name == "posthoc" else {}


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if trained(name)])
def test_every_tokenizer_trains(tmp_path, name):
    run = train_tokenizer(tmp_path / "run", model=node_of(name), train__steps=3, train__save_every=2)
    assert len(losses(run)) == 3 and all(map(math.isfinite, losses(run)))
    assert Tokenizer.from_pretrained(run / "tokenizer").name == name


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if not trained(name)])
def test_every_tokenizer_without_parameters_is_saved_without_a_step(tmp_path, monkeypatch, name):
    start = start_of(name, tmp_path / "start")
    monkeypatch.setattr(training, "take_step", lambda *_: pytest.fail("a step was taken"))
    run = train_tokenizer(tmp_path / "run", model=node_of(name), **start)
    assert [line["step"] for line in metrics(run)] == [0] and math.isfinite(metrics(run)[0]["held_out/psnr"])
    assert Tokenizer.from_pretrained(run / "tokenizer").name == name
    before = files(run)
    assert train_tokenizer(tmp_path / "run", model=node_of(name), **start) == run and files(run) == before


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_trains(tmp_path, name):
    run = train_tokenizer(tmp_path / "run", model={**VQVAE, "quantizer": QUANTIZERS[name]}, train__steps=3)
    assert len(losses(run)) == 3 and all(map(math.isfinite, losses(run)))


# Runs of earlier versions, in which a split for validation was not seen, and a name that was not there meant nothing


@pytest.mark.parametrize("saved", ["test", "vla"])
def test_a_run_goes_on_with_what_it_held_out(tmp_path, capsys, saved):
    for name, count in (("train", 20), ("val", 5)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    options = {"data__source": str(tmp_path / "images"), "train__steps": 1, "train__batch_size": 4}
    given = {} if saved == "test" else {"data__held_out": saved}
    run = train_tokenizer(tmp_path / "run", **options, data__held_out="test")  # which says that part is held out
    for path in (run / "config.yaml", run / "tokenizer" / "provenance.json"):
        assert "held_out" in path.read_text()
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("held_out: test", f"held_out: {saved}"))
    for state in states(run):  # which did not say of which run they were
        document = json.loads((state / "state.json").read_text())
        (state / "state.json").write_text(json.dumps({key: document[key] for key in ("step", "counters")}))
        (state / "manifest.json").unlink()
        write_manifest(state, step=1)
    capsys.readouterr()
    options["train__steps"] = 2
    train_tokenizer(run, **options, **given)
    told = capsys.readouterr()
    assert "continuing from step 1" in told.out and "18 training rows" in told.out
    assert f"there is no '{saved}', so 10% of 'train' is held out; not used: val" in told.err
    assert f"held_out: {saved}\n" in (run / "config.yaml").read_text()
    with pytest.raises(UserError, match=f"held_out: '{saved}' -> 'val'"):
        train_tokenizer(run, **options, data__held_out="val")
    if saved == "test":
        fresh = train_tokenizer(tmp_path / "fresh", **options)
        train_tokenizer(fresh, **{**options, "train__steps": 3})
        assert capsys.readouterr().out.count("20 training rows") == 2
        assert "held_out: null\n" in (fresh / "config.yaml").read_text()
    else:
        with pytest.raises(UserError, match="no split 'vla'.*did you mean 'val'"):
            train_tokenizer(tmp_path / "fresh", **options, **given)
