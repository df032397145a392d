"""Two processes train as one does: same figures and weights, equal state on both at every step, same tokens.

Covers: pipelines/processes/launch.py.
"""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import watched_runs
from launch import (
    MACHINE,
    VQVAE,
    arguments,
    assert_near,
    exact,
    launched,
    losses,
    make_tokens,
    metrics,
    output_of,
    prior_arguments,
    start,
    states,
    tensors,
    tokenizer_arguments,
    train_prior,
    train_stage,
    train_tokenizer,
    two_processes,
)
from one_process import one_process
from watched_runs import Watch, in_two_processes

from pipelines import encode
from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.processes.launch import build_accelerator
from pipelines.provenance import tokenizer_defaults
from pipelines.train_prior import PriorTask
from pipelines.train_tokenizer import TokenizerTask
from pipelines.training.trainer import Trainer

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_process")]

STEPS = 8
TOLERANCE = 1e-6  # relative; sums are taken in another order
BUSY = {"kind": "ema", "codes": 32, "dim": 8, "rate": 0.1, "revive_every": 2, "revive_below": 0.3}  # many are revived
EVERY = {"train__steps": STEPS, "train__evaluate_every": 4, "train__save_every": 4, "train__preview_every": 8}
RUNS: dict[str, dict[str, Any]] = {
    "train_tokenizer": {
        **EVERY,
        "data__augment__rotate": 8,
        "data__cache_mb": 0,  # so that each process checks its share of the files
        "model": {**VQVAE, "quantizer": BUSY},
    },
    "train_prior": {**EVERY, "train__optimizer": "muon", "train__accumulate": 2},
}
COMMON = ("loss", "gradient_norm")
PSNR, BITS = ("validation/psnr", "held_out/psnr"), ("validation/bits_per_token", "held_out/bits_per_token")
FIGURES = {
    "train_tokenizer": (*COMMON, "l2", "commitment", "codebook_usage", *PSNR),
    "train_prior": (*COMMON, "bits_per_token", *BITS),
}
WARM_UP = "tokenizer.quantizers.price.WARM_UP", 2
SMALL_BATCHES = {  # an uneven number of batches of 24 rows and of 72 images
    "pipelines.metrics.likelihood.LOGITS": 5 * 49 * 16,
    "pipelines.metrics.reconstruction.EVALUATED_PIXELS": 5 * 784,
}


# In each of two processes


def basic(watch: Watch) -> None:
    """Both stages, evaluated in small batches; non-finite losses, a signal, and mistakes."""
    folder, tokens = watch.folder, watch.folder / "tokens"
    with pytest.MonkeyPatch.context() as patched:
        for name, value in [WARM_UP, *SMALL_BATCHES.items()]:
            patched.setattr(name, value)
        for stage, more in RUNS.items():
            watch.run(stage, lambda stage=stage, more=more: train_stage(stage, folder / stage, tokens, **more))
    rank = int(os.environ["RANK"])
    with patch.object(TokenizerTask, "loss", not_finite_in({0, 3, 4, 7} if rank == 1 else set())):
        watch.run("non-finite", lambda: train_tokenizer(folder / "non-finite", **RUNS["train_tokenizer"]))
    for stop in (4, -1):  # SIGTERM to the second process only
        with patch.object(PriorTask, "loss", stopping_at(stop if rank == 1 else -1)):
            watch.run("stopped", lambda: train_prior(folder / "stopped", tokens, **RUNS["train_prior"]))
    seed = {"train__seed": rank}
    watch.run("other settings", lambda: train_tokenizer(folder / "other", **seed))
    with patch.object(Trainer, "require_room", Mock(side_effect=UserError("no room"))):
        watch.run("full disk", lambda: train_prior(folder / "full", tokens))
    encode.run(encoding(folder / "train_tokenizer" / "tokenizer", folder / "encoded"))


def not_finite_in(bad: set[int]) -> Any:
    """A tokenizer's loss that is not finite in these steps."""
    loss = TokenizerTask.loss

    def planted(self: Any, group_name: str, batch: Any, step: int) -> Any:
        value, terms = loss(self, group_name, batch, step)
        if step in bad:  # with and without a NaN gradient
            value = value * math.nan if step % 2 else value + math.inf
        return value, terms

    return planted


def stopping_at(stop: int) -> Any:
    """A prior's loss that sends SIGTERM in this step."""
    loss = PriorTask.loss

    def planted(self: Any, group_name: str, batch: Any, step: int) -> Any:
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, group_name, batch, step)

    return planted


def encoding(tokenizer: Path, out: Path) -> encode.EncodeConfig:
    """Settings to encode with augmentation, so that a batch spans variants."""
    argv = arguments({"tokenizer": str(tokenizer), "out": str(out), "data.limit": 37, "augmentations": 2})
    argv.append("batch_size=8")
    return parse(encode.EncodeConfig, argv, verb="encode", description=None, defaults=tokenizer_defaults)


# From outside


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("pair")
    make_tokens(folder / "tokens")
    return folder, *in_two_processes(__file__, "basic", folder)


@pytest.fixture(scope="module")
def alone(pair) -> dict[str, Path]:
    """The same runs in one process."""
    folder = pair[0]
    with one_process(), patch(*WARM_UP):
        return {
            stage: train_stage(stage, folder / f"{stage} alone", folder / "tokens", **RUNS[stage]) for stage in RUNS
        }


@pytest.mark.parametrize("stage", RUNS)
def test_two_train_as_one_does(pair, alone, stage):
    """Every figure, and at the end weights, averages, moments and the snapshot."""
    both = pair[0] / stage
    assert f"{both}: starting; " in pair[2] and pair[2].count("2 processes on cpu") == 5  # once per run
    for name in FIGURES[stage]:
        expected = losses(alone[stage], name)
        assert len(expected) == {"v": 2, "h": 1}.get(name[0] if "/" in name else "", STEPS)
        tolerance = 10 * TOLERANCE if name == "gradient_norm" else TOLERANCE
        assert losses(both, name) == pytest.approx(expected, rel=tolerance), name
    assert losses(both)[-1] < losses(both)[0]
    for part in ("tokenizer", "pipeline", "state/step-00000008"):
        if (both / part).is_dir():
            assert_near(tensors(both / part), tensors(alone[stage] / part), 1e-4, 2e-6)
    if stage == "train_tokenizer":  # both processes have refined the codebook
        codes = tensors(both)["tokenizer/model.safetensors:quantizer.codebook"]
        name = "state/step-00000008/tensors:average.tokenizer.quantizer.codebook"
        assert not torch.allclose(codes, tensors(both)[name], rtol=1e-3, atol=1e-3)
        assert tensors(both)["tokenizer/model.safetensors:quantizer.price.distance"] > 0


@pytest.mark.parametrize("name", ["train_tokenizer", "train_prior", "non-finite"])
def test_both_processes_have_equal_state_at_every_step(pair, name):
    """Weights, averages, moments and codebooks, each from its own images and random numbers."""
    steps = pair[1][name]["steps"]
    assert len(steps) == STEPS and len({each["seed"] for both in steps for each in both}) == 2 * STEPS
    for one, two in steps:
        assert one["replicated"] and two["replicated"] and one["batch"] != two["batch"]
        for part in ("weights", "average", "moments", "buffers"):
            assert one[part] == two[part]


@pytest.mark.parametrize("stage", RUNS)
def test_an_evaluation_is_shared_and_its_figures_are_the_same(pair, stage):
    """Also for an uneven number of batches."""
    rounds = list(zip(*pair[1][stage]["evaluations"], strict=True))
    finished = ["validation"] * (stage == "train_tokenizer")  # with the codebook after Lloyd steps
    assert [one["split"] for one, _ in rounds] == ["validation"] * 2 + finished + ["held_out"]
    for one, two in rounds:
        assert one["figures"] == two["figures"]
        assert len(one["shares"]) == (2 if stage == "train_tokenizer" else 1)  # images, and the cost of their codes
        for (mine, count), (others, _) in zip(one["shares"], two["shares"], strict=True):
            assert mine + others == count and mine - others == 1


def test_a_signal_to_one_stops_both_and_the_same_command_resumes_to_the_bit(pair):
    folder, found, printed = pair
    assert f"{folder / 'stopped'}: stopped at step 5;" in printed and len(found["stopped"]["steps"]) == STEPS
    assert found["stopped"]["errors"] == [""] * 4
    assert [both["weights"] for both, _ in found["stopped"]["steps"]] == [
        both["weights"] for both, _ in found["train_prior"]["steps"]
    ]


def test_a_step_that_is_not_finite_on_one_is_skipped_by_both(pair):
    steps = [one for one, _ in pair[1]["non-finite"]["steps"]]
    for step in range(1, STEPS):
        same = [steps[step][part] == steps[step - 1][part] for part in ("weights", "moments")]
        assert same == [step in (3, 4, 7)] * 2
    assert metrics(pair[0] / "non-finite")[-1]["skipped_steps"] == 4


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("other settings", "UserError: process 1 has different settings", "UserError: process 1 has different"),
        ("full disk", "UserError: no room", "ReportedElsewhere: no room"),
    ],
)
def test_an_error_on_one_ends_both(pair, name, first, second):
    """Including errors that only the main process can find."""
    one, two = pair[1][name]["errors"]
    assert one.startswith(first) and two.startswith(second)


def test_two_encode_as_one_does(pair, tmp_path):
    encode.run(encoding(pair[0] / "train_tokenizer" / "tokenizer", tmp_path / "alone"))
    names = [path.name for path in (tmp_path / "alone").iterdir() if path.is_file()]
    assert "train.safetensors" in names
    for name in names:
        assert (pair[0] / "encoded" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


# The documented command

FROZEN = """
import os, signal
from pipelines import train_tokenizer
from pipelines.training.trainer import Trainer
take_step = Trainer.take_step
def freeze(trainer, *rest):
    if trainer.step == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    take_step(trainer, *rest)
Trainer.take_step = freeze
train_tokenizer.main()
"""


@pytest.mark.slow
def test_a_frozen_process_ends_the_run_after_its_timeout(tmp_path):
    """The same command then resumes."""
    (tmp_path / "frozen.py").write_text(FROZEN)
    run, settings = tmp_path / "run", {"train__save_every": 4, "train__steps": 8, "train__timeout": 1}
    argv = tokenizer_arguments(run, **settings)
    process = start(launched(["--multi_gpu", "--num_processes", "2", *MACHINE], str(tmp_path / "frozen.py"), *argv))
    began = time.monotonic()
    printed = output_of(process, 150, code=1)
    assert time.monotonic() - began < 120 and "imed out" in printed, printed  # torchrun waits for 30 more seconds
    assert [state.name for state in states(run)] == ["step-00000004"]
    train_tokenizer(run, **settings)
    assert [line["step"] for line in metrics(run) if "loss" in line] == [*range(1, 9)]


@pytest.mark.slow
def test_the_documented_command_trains_in_two_processes(pair, tmp_path):
    run, stage = tmp_path / "run", "train_prior"
    printed = output_of(start(two_processes(stage, prior_arguments(run, pair[0] / "tokens", **RUNS[stage]))))
    assert printed.count("2 processes on cpu") == 1, printed
    figures = ("loss", "gradient_norm")
    assert [[line[name] for name in figures] for line in exact(run) if "loss" in line] == [
        [line[name] for name in figures] for line in exact(pair[0] / stage) if "loss" in line
    ]


def test_gradient_accumulation_by_accelerate_is_refused(monkeypatch):
    """The loop accumulates by itself, and accelerate would divide every loss once more."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert build_accelerator().gradient_accumulation_steps == 1
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(UserError, match=r"^ACCELERATE_GRADIENT_ACCUMULATION_STEPS=\w*: .*train\.accumulate"):
        build_accelerator()


if __name__ == "__main__":
    watched_runs.main(globals())
