"""A step: its gradients, its precision, and what it does when its loss is not finite."""

from __future__ import annotations

import math
import os
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from launch import (
    EMA,
    GPT,
    VQVAE,
    assert_equal_tensors,
    exact,
    losses,
    metrics,
    states,
    tensors,
    train_prior,
    train_tokenizer,
)
from one_process import begin_anew
from small import QUANTIZERS, node_of

from pipelines.config import UserError
from pipelines.processes.precision import told_precision
from pipelines.train_prior import PriorTask
from pipelines.train_tokenizer import TokenizerTask
from pipelines.training import loop as training
from pipelines.training import starting
from pipelines.training import step as one_step
from pipelines.training.state import Unread
from prior import Prior

FSQ = {"kind": "fsq", "levels": [5, 4, 3]}


pytestmark = pytest.mark.usefixtures("one_process")

# Gradients and precision


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
    full, types, objective = {}, set(), Prior.loss_from_outputs

    def watched(prior, logits, *rest, **inputs):
        types.add(logits.dtype)
        return objective(prior, logits, *rest, **inputs)

    monkeypatch.setattr(Prior, "loss_from_outputs", watched)
    for name, train in {"tokenizer": train_tokenizer, "prior": lambda out, **m: train_prior(out, tokens, **m)}.items():
        run = train(tmp_path / name, train__steps=20)
        found = losses(run)
        assert len(found) == 20 and all(map(math.isfinite, found)) and found[-1] < 0.8 * found[0]
        assert not metrics(run)[-1]["skipped_steps"]
        full[name] = found
    assert capsys.readouterr().out.count("bf16 mixed precision") == 2
    assert types == {torch.bfloat16}  # logits are not cast as a whole, as accelerate does with what is returned
    begin_anew()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert losses(train_prior(tmp_path / "float32", tokens, train__steps=20)) != full["prior"]  # so it was used


def test_float32_on_a_gpu_that_has_bf16_is_said_once(tmp_path, monkeypatch, capsys):
    """In one line with the option to give; nothing is said of what was asked for, or cannot be had."""
    for precision, has_bf16 in (("bf16", True), ("no", False), ("bf16", False)):
        assert told_precision(precision, has_bf16) == ""
    line = told_precision("no", True)
    assert "--mixed_precision bf16" in line and "float32" in line and "\n" not in line
    before = torch.backends.cuda.matmul.fp32_precision
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)  # of a GPU that is not used
    monkeypatch.setattr(starting, "told_precision", lambda precision, has_bf16: f"{precision} {has_bf16}")
    train_tokenizer(tmp_path / "run", train__steps=1)
    assert capsys.readouterr().out.count("run: no False\n") == 1
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_fp16_is_refused(tmp_path, monkeypatch):
    accelerator = SimpleNamespace(num_processes=1, mixed_precision="fp16", device=torch.device("cpu"))
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: accelerator)
    with pytest.raises(UserError, match="bf16"):
        train_tokenizer(tmp_path / "run")


def test_micro_batches_train_what_one_batch_does(tmp_path):
    model = {**VQVAE, "quantizer": {"kind": "fsq", "levels": (5, 5)}}
    one, four = (train_tokenizer(tmp_path / str(n), model=model, train__steps=12, train__accumulate=n) for n in (1, 4))
    for name in ("loss", "l2"):
        assert losses(four, name) == pytest.approx(losses(one, name), rel=1e-3), name


def test_a_codebook_follows_each_micro_batch(tmp_path):
    run = train_tokenizer(tmp_path / "run", model={**VQVAE, "quantizer": EMA}, train__steps=3, train__accumulate=4)
    assert int(tensors(run / "tokenizer")["model.safetensors:quantizer.started"]) == 12


# What a GPU is not waited for


def on_call(monkeypatch, owner, name: str, turn: int, number: int) -> None:
    """The signal, before the `turn`-th call."""
    call, calls = getattr(owner, name), iter(range(1, 1000))

    def called(*arguments):
        if next(calls) == turn:
            os.kill(os.getpid(), number)
        return call(*arguments)

    monkeypatch.setattr(owner, name, called)


def read_late(monkeypatch) -> list[int]:
    """As on a GPU: numbers of a step are nonsense until they are waited for, in the next one. At which steps a run
    waits."""
    send, waited = one_step.sent, []

    def late(turns):
        numbers = send(turns).values
        arriving = numbers.clone()

        def arrive():
            arriving.copy_(numbers)
            waited.append(len(waited) + 1)

        return Unread(turns, arriving.fill_(math.nan), SimpleNamespace(synchronize=arrive))

    monkeypatch.setattr(one_step, "sent", late)
    return waited


CRITIC = {"weight": 0.5, "start": 2, "width": 8, "layers": 1, "warmup": 2, "ramp": 2, "lecam": 0.01}


OFTEN = {"train__log_every": 3, "train__save_every": 3, "train__evaluate_every": 6}


@pytest.mark.parametrize("stage", ["tokenizer", pytest.param("prior", marks=pytest.mark.slow)])
def test_what_is_read_a_step_late_makes_no_difference(stage, tmp_path, tokens, monkeypatch):
    """To no bit of figures, weights, averages and moments, with steps that are skipped, and stopped in the midst."""
    poison(monkeypatch, TokenizerTask, {3, 4, 8}, SICK["nan gradient"])
    poison(monkeypatch, PriorTask, {3, 4, 8}, SICK["nan loss"])
    if stage == "tokenizer":
        model = {**VQVAE, "quantizer": {**EMA, "revive_every": 2, "revive_below": 0.3}}
        train = partial(train_tokenizer, model=model, critic=CRITIC, train__accumulate=2, **OFTEN)
    else:
        model = {**GPT, "any_order": True, "dropout": 0.1}
        train = partial(train_prior, tokens=tokens, model=model, train__optimizer="muon", **OFTEN)
    at_once = train(tmp_path / "at once")
    with monkeypatch.context() as patch:
        waited = read_late(patch)
        late = train(tmp_path / "late")
        assert len(waited) == 12
        for turn in (4, 1, 3):  # also right after a step that was skipped; the signal is known of a step later
            with patch.context() as told:
                on_call(told, training, "take_step", turn, signal.SIGTERM)
                train(tmp_path / "stopped")
        stopped = train(tmp_path / "stopped")
    for run in (late, stopped):
        assert exact(run) == exact(at_once)
        assert_equal_tensors(tensors(run / "state"), tensors(at_once / "state"))
    assert [path.name for path in states(late)] == ["step-00000009", "step-00000012"]  # the first after a sick step
    assert metrics(late)[-1]["skipped_steps"] == 3


# What is not finite


def is_learned(key: str) -> bool:
    """Whether an optimizer moves it: no count, and no codebook, which has moved before a step is skipped."""
    return not any(part in key for part in ("use.", "quantizer.", ".power_iteration", "n_averaged"))


def all_that_a_step_changes(run) -> dict[str, torch.Tensor]:
    """Copies of all that an optimizer step may change."""
    optimizer = run.optimizers["model"].state_dict()["state"]
    moments = {f"{index}.{name}": value for index, entry in optimizer.items() for name, value in entry.items()}
    parts = {"model": run.task.model.state_dict(), "average": run.averaged.state_dict(), "optimizer": moments}
    named = {f"{part} {key}": value.clone() for part, values in parts.items() for key, value in values.items()}
    return {key: value for key, value in named.items() if is_learned(key)}


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
    ("quantizer", "how", "optimizer"),
    [
        ("ema", "nan loss", "muon"),
        ("ema", "infinite loss", "adamw"),
        ("fsq", "nan gradient", "muon"),
        *(pytest.param(name, "nan gradient", "adamw", marks=pytest.mark.slow) for name in QUANTIZERS if name != "fsq"),
    ],
)
def test_a_sick_step_changes_nothing_and_is_counted(tmp_path, monkeypatch, quantizer, how, optimizer):
    sick, changed = {3, 4, 8}, {}
    poison(monkeypatch, TokenizerTask, sick, SICK[how])
    take_step = training.take_step

    def watched(run, *rest):
        step, before = run.step, all_that_a_step_changes(run)
        take_step(run, *rest)
        changed[step] = [
            key for key, value in all_that_a_step_changes(run).items() if not torch.equal(value, before.get(key, value))
        ]

    monkeypatch.setattr(training, "take_step", watched)
    more = {"train__save_every": 2, "train__optimizer": optimizer}
    run = train_tokenizer(tmp_path / "run", model={**VQVAE, "quantizer": node_of(quantizer)}, **more)
    assert set(changed) == set(range(12)) and {step for step, keys in changed.items() if not keys} == sick
    assert metrics(run)[-1]["skipped_steps"] == 3
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2, 3, 6, 7, 8, 10, 11, 12]
    assert all(torch.isfinite(value.float()).all() for value in tensors(run).values())


def test_the_first_step_may_be_sick(tmp_path, monkeypatch):
    """k-means over images that are not numbers must not be what the codebook starts from."""
    for name in ("ema", "vq"):
        with monkeypatch.context() as patch:
            prepare = TokenizerTask.prepare
            calls = iter(range(100))

            def first_is_sick(self, batch, prepare=prepare, calls=calls):
                (images,) = prepare(self, batch)
                return (images * math.nan if next(calls) == 0 else images,)

            patch.setattr(TokenizerTask, "prepare", first_is_sick)
            model = {**VQVAE, "quantizer": node_of(name)}
            run = train_tokenizer(tmp_path / name, model=model, train__save_every=1)
        assert metrics(run)[-1]["skipped_steps"] == 1 and losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize(
    ("how", "late"), [*(pytest.param(how, False, marks=pytest.mark.slow) for how in SICK), ("nan gradient", True)]
)
def test_ten_sick_steps_in_a_row_end_the_run(tmp_path, monkeypatch, how, late):
    if late:
        read_late(monkeypatch)
    poison(monkeypatch, TokenizerTask, set(range(2, 9)) | set(range(12, 99)), SICK[how])
    tensor = "loss" if how == "infinite loss" else r"the gradient of tokenizer.encoder\S+"
    with pytest.raises(UserError, match=rf"step 22: 10 steps in a row .* {tensor}"):
        train_tokenizer(tmp_path / "run", train__steps=40, train__save_every=4)
    kept = [path.name for path in states(tmp_path / "run")]
    assert kept == ["step-00000016", "step-00000020"]
    assert all(torch.isfinite(value.float()).all() for value in tensors(tmp_path / "run").values())
    (first, second) = (
        {key: value for key, value in tensors(path).items() if is_learned(key)} for path in states(tmp_path / "run")
    )
    assert_equal_tensors(second, first)
    with pytest.raises(UserError, match="step 22:"):  # started again, it still knows that the last eight were sick
        train_tokenizer(tmp_path / "run", train__steps=40, train__save_every=4)


def test_figures_that_are_no_numbers_are_left_out(tmp_path, capsys):
    """Of weights that one step has made too large for arithmetic; a run goes on with them, or ends by its own rule."""
    sizes = {"train__lr": 1e25, "train__warmup_steps": 0, "train__evaluate_every": 1, "train__save_every": 1}
    for begun in (1, 2):  # the second time the run goes on from what the first has saved
        with pytest.raises(UserError, match="10 steps in a row were not finite"):
            train_tokenizer(tmp_path / "run", train__steps=20, **sizes)
        assert "step 1: psnr, l1, l2 of validation: not finite, and left out" in capsys.readouterr().err or begun == 2
    figures = [value for line in metrics(tmp_path / "run") for value in line.values()]
    assert all(map(math.isfinite, figures))
    assert "validation/codebook_usage" in metrics(tmp_path / "run")[0]
