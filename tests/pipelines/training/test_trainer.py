"""The training loop: batches, steps, non-finite losses, logs and results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from folders import contents
from launch import (
    VQVAE,
    assert_equal_tensors,
    exact,
    losses,
    make_tokens,
    metrics,
    states,
    train_prior,
    train_tokenizer,
)
from one_process import one_process
from PIL import Image
from small import PRIORS, QUANTIZERS, TOKENIZERS, make_tokenizer, node_of
from tiny_task import Net, TinyTask, assert_same_tensors, read_checkpoint, stopped_at, train_tiny, trainer_of
from torch import Tensor, nn

from pipelines import ImagePipeline
from pipelines.config import UserError
from pipelines.images import DataConfig, load_images
from pipelines.metrics.likelihood import bits_per_token
from pipelines.metrics.reconstruction import evaluate_reconstruction
from pipelines.shuffling import samples_of
from pipelines.tokens import load_tokens
from pipelines.train_tokenizer import TokenizerTask
from pipelines.training.checkpoint import collect_tensors
from pipelines.training.schedule import TrainConfig, learning_rate
from pipelines.training.task import Task
from pipelines.training.trainer import Trainer
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_process")


@contextmanager
def after_each_step(observe: Callable[[Trainer], object]) -> Iterator[None]:
    """Call `observe` before the first step in the block, and after each one."""
    take_step, seen = Trainer.take_step, []

    def watched(trainer: Trainer, *given: Any) -> None:
        if not seen:
            observe(trainer)
        seen.append(trainer.step)
        take_step(trainer, *given)
        observe(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "take_step", watched)
        yield


def copy_state(trainer: Trainer) -> dict[str, Tensor]:
    """Copy weights and moments."""
    found = collect_tensors(trainer.task.model, trainer.task.model, trainer.optimizers)
    return {name: value.clone() for name, value in found.items() if not name.startswith("average.")}


# Batches


def streams_of(task: Task, config: TrainConfig, step: int, processes: int) -> list[Generator[Any, None, None]]:
    """The batch streams of several ranks from `step` on, without processes."""

    def of(rank: int) -> Generator[Any, None, None]:
        group = SimpleNamespace(rank=rank, world=processes)
        run: Any = SimpleNamespace(step=step, config=config, task=task, group=group, device=torch.device("cpu"))
        return Trainer.batches(run)

    return [of(rank) for rank in range(processes)]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(processes, accumulate):
    task: Any = Task()
    task.rows, task.batch = 50, lambda indices, epochs, seed: (indices, epochs, seed)
    config = TrainConfig(batch_size=24, accumulate=accumulate, seed=5)
    streams = streams_of(task, config, 7, processes)
    for step in range(7, 20):
        parts = [next(stream) for stream in streams]
        laid_out = [part for micro in zip(*parts, strict=True) for part in micro]  # micro-batch by micro-batch
        indices, epochs = samples_of(50, 24, 5, step)
        assert (np.concatenate([part[0] for part in laid_out]) == indices).all()
        assert (np.concatenate([part[1] for part in laid_out]) == epochs).all()
        assert {part[2] for part in laid_out} == {5}
    for stream in streams:
        stream.close()


def test_augmentation_may_apply_to_the_prior_alone(tmp_path):
    """With augmented=false the tokenizer sees plain images."""
    augment = {"data__augment__flip": True, "data__augment__rotate": 9, "train__steps": 2}
    plain = train_tokenizer(tmp_path / "plain", train__steps=2)
    without = train_tokenizer(tmp_path / "without", augmented=False, **augment)
    augmented = train_tokenizer(tmp_path / "augmented", **augment)
    assert exact(without) == exact(plain) != exact(augmented)


# A step


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    for optimizer in ("adamw", "muon"):
        found = {}
        for parts in (1, 4):
            out = tmp_path / f"{optimizer}{parts}"
            found[parts] = train_tiny(out, lambda: TinyTask(net=Net(plain=True)), accumulate=parts, optimizer=optimizer)
        for name in ("loss", "l1", "gradient_norm"):
            assert losses(found[4], name) == pytest.approx(losses(found[1], name), rel=1e-4)
        assert len(set(losses(found[4]))) == 8


def test_each_player_steps_its_own_weights_at_its_own_rate(tmp_path):
    with trainer_of(tmp_path / "run", TinyTask(critic_start=1), accumulate=2) as trainer:
        trainer.task.rates = {"critic": 0.5}
        parts = [trainer.task.batch(np.arange(4) + start, np.zeros(4, np.int64), 0) for start in (0, 4)]
        before = copy_state(trainer)
        for lr, players in ((0.1, {"net"}), (0.2, {"net", "critic"})):  # the critic starts at step 1
            trainer.take_step(parts, lr)
            after = copy_state(trainer)
            assert {name.split(".")[1] for name in before if not torch.equal(after[name], before[name])} == players
        rates = {group_name: optimizer.param_groups[0]["lr"] for group_name, optimizer in trainer.optimizers.items()}
        assert rates == {"model": 0.2, "critic": 0.1} and not trainer.task.predictions
        assert all(parameter.grad is None for parameter in trainer.task.model.parameters())


def test_gradients_are_clipped_and_the_logged_norm_is_unclipped(tmp_path, monkeypatch):
    applied, step = [], torch.optim.AdamW.step

    def watched(optimizer: Any, *given: Any) -> Any:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        applied.append(float(torch.cat([w.grad.flatten() for w in weights if w.grad is not None]).norm()))
        return step(optimizer, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run = train_tiny(tmp_path / "run", clip=0.05)
    assert len(applied) == 8 and 0.049 < max(applied) <= 0.05 * (1 + 1e-4) and min(losses(run, "gradient_norm")) > 0.05


def test_a_run_follows_the_schedule(tmp_path):
    """Linear warm-up, the peak, and a linear fall to `final_lr`."""
    config = TrainConfig(steps=100, lr=2.0, final_lr=0.1, warmup_steps=10, decay_from=0.6)
    rates = [learning_rate(config, step, step / 100) for step in range(130)]
    assert rates[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)])
    assert rates[10:61] == pytest.approx([2.0] * 51)
    assert rates[80] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert all(a > b for a, b in zip(rates[60:100], rates[61:101], strict=True))
    assert rates[100:] == pytest.approx([0.2] * 30)
    from_the_start = TrainConfig(decay_from=0, warmup_steps=0)
    assert learning_rate(from_the_start, 25, 0.25) == pytest.approx(0.75e-3)
    used: list[float] = []
    with after_each_step(lambda trainer: used.append(trainer.optimizers["model"].param_groups[0]["lr"])):
        run = train_tiny(tmp_path / "run", warmup_steps=3)
    config = TrainConfig(steps=8, lr=1e-2, warmup_steps=3)
    expected = [learning_rate(config, step, step / 8) for step in range(9)]
    assert used[1:] == pytest.approx(expected[:8])
    assert [line["learning_rate"] for line in metrics(run)] == pytest.approx(expected[1:])


def test_the_average_follows_its_formula(tmp_path):
    """The decay starts small, and buffers are copied."""
    seen: list[dict[str, Tensor]] = []
    with after_each_step(lambda trainer: seen.append(copy_state(trainer))):
        run = train_tiny(tmp_path / "run", ema_decay=0.3)  # reached by (1 + n) / (10 + n) at n = 3
    found = read_checkpoint(states(run)[-1])
    for name in [name.removeprefix("average.") for name in found if name.startswith("average.")]:
        average, weights = found[f"average.{name}"].double(), [at[f"model.{name}"].double() for at in seen[1:]]
        if "running" in name or "tracked" in name:
            assert torch.equal(average, weights[-1])
            continue
        expected = weights[0]
        for n, weight in enumerate(weights[1:], start=1):
            decay = min(0.3, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * weight
        assert torch.allclose(average, expected, atol=1e-6) and not torch.equal(average, weights[-1])


# Non-finite values


def spoil(loss: Tensor, model: nn.Module, how: str) -> Tensor:
    """Make the loss non-finite, or only its gradient."""
    if how == "gradient":
        return loss + sum((parameter * 0).sum().sqrt() for parameter in model.parameters())
    return loss * math.nan if how == "nan" else loss + math.inf


@pytest.mark.sparse
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("how", ["nan", "infinite", "gradient"])
def test_a_non_finite_step_changes_nothing_and_is_counted(tmp_path, how, optimizer):
    """It leaves the group_name's weights, moments and step counts alone; the other group_name trains on."""
    bad_steps = {"model": {0, 3, 4}, "critic": {4, 6}}

    def change(group_name: str, step: int, loss: Tensor, model: nn.Module) -> Tensor:
        return spoil(loss, model, how) if step in bad_steps[group_name] else loss

    seen: list[dict[str, Tensor]] = []
    with after_each_step(lambda trainer: seen.append(copy_state(trainer))):
        run = train_tiny(tmp_path / "run", lambda: TinyTask(critic_start=0, change_loss=change), optimizer=optimizer)
    for step, (before, after) in enumerate(zip(seen, seen[1:], strict=False)):
        for group_name, module in (("model", "net"), ("critic", "critic")):
            names = [n for n in after if f"{module}." in n and "running" not in n and "tracked" not in n]
            changed = [name for name in names if not torch.equal(after[name], before.get(name, 0 * after[name]))]
            assert bool(changed) == (step not in bad_steps[group_name]), (step, group_name, changed)
    lines = metrics(run)
    assert lines[-1]["skipped_steps"] == 4
    assert {line["step"] for line in lines if "model/loss" not in line} == {1, 4, 5}
    assert {line["step"] for line in lines if "critic/loss" not in line} == {5, 7}
    assert all(math.isfinite(value) for line in lines for value in line.values())
    found = read_checkpoint(states(run)[-1])
    assert all(torch.isfinite(value.float()).all() for value in found.values())
    assert {int(value) for name, value in found.items() if name.endswith("head.weight/step")} == {5}
    assert {int(value) for name, value in found.items() if "critic/" in name and name.endswith("/step")} == {6}


def test_logged_scalars_are_means_over_the_finite_steps(tmp_path):
    """A stop in between does not matter; a scalar of only some steps is the mean over these."""

    def change(group_name: str, step: int, loss: Tensor, model: nn.Module) -> Tensor:
        return loss * math.nan if step in (1, 6) else loss

    task = partial(TinyTask, critic_start=3, change_loss=change)
    every = {line["step"]: line for line in metrics(train_tiny(tmp_path / "every", task))}
    assert {step for step, line in every.items() if "model/l1" not in line} == {2, 7}
    with stopped_at(2):
        train_tiny(tmp_path / "run", task, log_every=4)
    for line in metrics(train_tiny(tmp_path / "run", task, log_every=4)):
        steps = range(line["step"] - 3, line["step"] + 1)
        for name in ("model/loss", "model/l1", "model/gradient_norm", "critic/loss"):
            values = [every[step][name] for step in steps if name in every[step]]
            assert line[name] == pytest.approx(sum(values) / len(values), rel=1e-6)
        assert line["skipped_steps"] == {4: 1, 8: 2}[line["step"]]


def test_ten_non_finite_steps_in_a_row_end_the_run_also_after_a_resume(tmp_path):
    """The error names the non-finite term; nine steps in a row do not end the run."""

    def change(group_name: str, step: int, loss: Tensor, model: nn.Module) -> Tensor:
        at = step in range(1, 10) or step >= 12
        return spoil(loss, model, "gradient") if at and group_name == "critic" else loss

    task = partial(TinyTask, critic_start=0, change_loss=change)
    for _ in range(2):
        with pytest.raises(UserError, match=r"step 22: .*critic/gradient_norm.*train.lr"):
            train_tiny(tmp_path / "run", task, steps=40, save_every=4)
        assert [path.name for path in states(tmp_path / "run")] == ["step-00000016", "step-00000020"]


def test_a_codebook_is_not_initialized_from_non_finite_images(tmp_path, monkeypatch):
    prepare, calls = TokenizerTask.prepare, iter(range(100))

    def spoil_the_first(task: Any, batch: Any) -> Any:
        (images,) = prepare(task, batch)
        return (images * math.nan if next(calls) == 0 else images,)

    monkeypatch.setattr(TokenizerTask, "prepare", spoil_the_first)
    run = train_tokenizer(tmp_path / "run", train__steps=6)
    assert metrics(run)[-1]["skipped_steps"] == 1 and losses(run)[-1] < losses(run)[0]


# The end


def test_a_limit_in_minutes_cuts_a_run_and_no_schedule(tmp_path, capsys):
    """Continued without the limit, it is the run that had none."""
    cut, continued = TinyTask(), TinyTask()
    whole, run = train_tiny(tmp_path / "whole"), train_tiny(tmp_path / "run", lambda: cut, minutes=1e-9)
    assert metrics(run)[-1]["step"] == cut.facts["steps"] == 1 and "held_out/error" in metrics(run)[-1]
    assert cut.facts["cut"] == {"minutes": 1e-9, "steps": 8}
    before = contents(run)
    assert contents(train_tiny(run, minutes=1e-9)) == before
    line = "stopped by train.minutes=1e-09 after 1 of 8 steps"
    assert capsys.readouterr().out.count(line) == 2
    train_tiny(run, lambda: continued)
    assert "cut" not in continued.facts
    assert_same_tensors(read_checkpoint(states(run)[-1]), read_checkpoint(states(whole)[-1]))
    assert losses(run, "learning_rate") == losses(whole, "learning_rate")


def test_without_steps_schedules_follow_minutes(tmp_path):
    """As in presets of 0.3, whose runs continue, with later minutes or with steps."""
    train = partial(train_tiny, tmp_path / "run", final_lr=0.25)
    done = metrics(train(steps=None, minutes=0.003))[-1]
    assert 0.003 <= done["minutes"] < 0.1 and done["step"] > 2 and "held_out/error" in done
    assert done["learning_rate"] == pytest.approx(1e-2 * 0.25)  # the end of the fall
    last = metrics(train(steps=None, minutes=done["minutes"] + 0.003))[-1]
    assert last["step"] > done["step"] and last["minutes"] >= done["minutes"] + 0.003
    with pytest.raises(UserError, match="train.minutes"):
        train(steps=None, minutes=0.002)
    run = train(steps=last["step"] + 3)
    assert [line["step"] for line in metrics(run)] == list(range(1, last["step"] + 4))


# Results of the two stages

EVERY = {"train__log_every": 2, "train__evaluate_every": 4, "train__preview_every": 6, "train__save_every": 5}
KEYS = {"learning_rate", "images_per_second", "tokens_per_second", "minutes", "skipped_steps", "gradient_norm", "loss"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> dict[str, Path]:
    """A finished run of each stage."""
    folder = tmp_path_factory.mktemp("runs")
    with one_process():
        return {
            "tokenizer": train_tokenizer(folder / "tokenizer", charts=True, **EVERY),
            "prior": train_prior(folder / "prior", tokens, **EVERY, sampler__guidance_scale=1.5),
        }


FIGURES = {"l1", "l2", "codebook_usage", "codebook_perplexity"}


@pytest.mark.parametrize(
    ("stage", "own", "evaluated"),
    [
        ("tokenizer", FIGURES | {"commitment", "codebook_dead"}, FIGURES | {"psnr"}),
        ("prior", {"bits_per_token"}, {"bits_per_token"}),
    ],
)
def test_metrics_have_the_documented_names_and_previews_are_pictures(runs, stage, own, evaluated):
    lines = metrics(runs[stage])
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    for line in lines:
        expected = {"step"} | KEYS | own
        expected |= {f"validation/{name}" for name in evaluated} if line["step"] in (4, 8, 12) else set()
        expected |= {f"held_out/{name}" for name in evaluated} if line["step"] == 12 else set()
        assert set(line) == expected and all(math.isfinite(value) for value in line.values())
        assert line["tokens_per_second"] == pytest.approx(49 * line["images_per_second"])
        if stage == "tokenizer":
            assert 0 < line["codebook_usage"] <= 1 <= line["codebook_perplexity"] <= 16
        else:
            assert line["bits_per_token"] == pytest.approx(line["loss"] / math.log(2))
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"], "nothing is learned"
    for name in ("reconstructions", "codebook") if stage == "tokenizer" else ("samples",):
        pictures = [np.asarray(Image.open(runs[stage] / f"previews/{name}-{step:08d}.png")) for step in (0, 6, 12)]
        assert all(min(picture.shape[:2]) >= 80 and picture.std() > 5 for picture in pictures)
        assert not np.array_equal(pictures[0], pictures[-1])


def assert_averaged(model: nn.Module, run: Path, prefix: str, finished: frozenset[str] = frozenset()) -> None:
    """Assert that the model has the averaged weights of the newest checkpoint, except those that were `finished`."""
    found = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    averages = {name: value for name, value in read_checkpoint(states(run)[-1]).items() if name.startswith(prefix)}
    changed = {prefix + name for name in finished}
    assert not any(torch.equal(found.pop(name), averages.pop(name)) for name in changed)
    assert_equal_tensors(found, averages)


def test_the_saved_tokenizer_has_the_logged_figures(runs):
    run, last = runs["tokenizer"], metrics(runs["tokenizer"])[-1]
    saved = Tokenizer.from_pretrained(run / "tokenizer")
    found = evaluate_reconstruction(saved, load_images(DataConfig(limit=72)).held_out)
    assert found == {name: last[f"held_out/{name}"] for name in found}
    assert_averaged(saved, run, "average.tokenizer.", frozenset({"quantizer.codebook", "quantizer.sums"}))
    facts = json.loads((run / "tokenizer" / "provenance.json").read_text())
    assert facts["tokenizer"]["steps"] == 12 and facts["data"]["limit"] == 72
    validation = load_images(DataConfig(limit=72)).validation
    validated = {f"validation_{name}": value for name, value in evaluate_reconstruction(saved, validation).items()}
    assert facts["tokenizer"]["evaluation"] == found | validated and facts["tokenizer"]["best_step"] == 12
    assert facts["tokenizer"]["images"] == {"validation": 72, "held_out": 72}


def test_the_saved_pipeline_has_the_logged_figures(runs, tokens):
    run = runs["prior"]
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    held_out = bits_per_token(pipe.prior, load_tokens(tokens).splits["test"])
    assert held_out == metrics(run)[-1]["held_out/bits_per_token"]
    assert_averaged(pipe.prior, run, "average.")
    assert pipe.tokenizer.fingerprint() == load_tokens(tokens).tokenizer.fingerprint()
    assert len(pipe(num_images=2, labels=["class 1", "class 2"], seed=0, progress=False).images) == 2


# Every model


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_trains(tmp_path, tokens, name):
    if name == "next_scale":
        tokens = make_tokens(tmp_path / "tokens", quantizer=node_of("multiscale"))
    run = train_prior(tmp_path / "run", tokens, model=node_of(name), train__steps=2)
    assert len(losses(run)) == 2 and all(map(math.isfinite, losses(run)))
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    held_out = bits_per_token(pipe.prior, load_tokens(tokens).splits["test"])
    assert pipe.prior.name == name and held_out == metrics(run)[-1]["held_out/bits_per_token"]


def is_trained(name: str) -> bool:
    """Whether it has weights to train; those of clips are trained as tokenizers of single frames."""
    tokenizer = make_tokenizer(name, (28, 28), 1)
    return tokenizer.spec.frames == 1 and any(parameter.requires_grad for parameter in tokenizer.parameters())


NODES = {name: node_of(name) for name in TOKENIZERS if is_trained(name)}
NODES |= {f"vqvae, {name}": {**VQVAE, "quantizer": node_of(name)} for name in QUANTIZERS}


@pytest.mark.parametrize("name", NODES)
def test_every_tokenizer_and_quantizer_trains(tmp_path, name):
    run = train_tokenizer(tmp_path / "run", model=NODES[name], train__steps=2, data__limit=30)
    assert len(losses(run)) == 2 and all(map(math.isfinite, losses(run)))
    assert Tokenizer.from_pretrained(run / "tokenizer").name == NODES[name]["kind"]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if not is_trained(name) and name != "frame_by_frame"])
def test_a_tokenizer_without_parameters_is_saved_without_a_step(tmp_path, monkeypatch, capsys, name):
    start = {}
    if name == "posthoc":
        vae = train_tokenizer(tmp_path / "start", model=node_of("klvae"), train__steps=1)
        start = {"init": str(vae / "tokenizer")}
    monkeypatch.setattr(Trainer, "take_step", lambda *_: pytest.fail("a step was taken"))
    run = train_tokenizer(tmp_path / "run", model=node_of(name), **start)
    assert [line["step"] for line in metrics(run)] == [0] and math.isfinite(metrics(run)[0]["held_out/psnr"])
    assert Tokenizer.from_pretrained(run / "tokenizer").name == name
    assert "done: nothing to train, PSNR" in capsys.readouterr().out
    before = contents(run)
    assert train_tokenizer(tmp_path / "run", model=node_of(name), **start) == run and contents(run) == before
