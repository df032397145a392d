"""Two processes with sharded weights (FSDP2) train as two with replicated ones, and as one; each can resume another's
run."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
import watched_runs
from accelerate.state import AcceleratorState
from launch import (
    MACHINE,
    ROOT,
    assert_equal_tensors,
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
)
from one_process import one_process
from small import PRIORS, node_of
from tiny_task import killed_at
from torch.distributed.tensor import DTensor
from watched_runs import Watch, in_two_processes

from pipelines import ImagePipeline
from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.metrics.likelihood import bits_per_token
from pipelines.tokens import load_tokens
from pipelines.train_tokenizer import TokenizerTask, TrainTokenizerConfig
from pipelines.training.sharding import require_shardable

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_process")]
TOLERANCE = 1e-6  # relative; sums are taken in another order
FIGURES = ("loss", "bits_per_token", "gradient_norm", "validation/bits_per_token", "held_out/bits_per_token")
STEPS = 8
RUN = {"train__steps": STEPS, "train__save_every": 4, "train__evaluate_every": 2, "train__optimizer": "muon"}
OTHERS = [name for name in PRIORS if name not in ("gpt", "marginal", "next_scale")]  # which needs other tokens
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


# In each of two processes


def run(watch: Watch, name: str, more: dict[str, Any] = RUN, stop: int = -1, sharded: bool = True) -> None:
    """Train with sharded or replicated weights, evaluated on an uneven number of batches."""
    with (
        patch.dict(os.environ, {**FSDP, "ACCELERATE_USE_FSDP": str(sharded).lower()}),
        patch("pipelines.metrics.likelihood.LOGITS", 5 * 49 * 16),
    ):
        watch.run(name, lambda: train_prior(watch.folder / name, watch.folder / "tokens", **more), stop)


def basic(watch: Watch) -> None:
    """Uninterrupted and interrupted runs, by one process and by two."""
    run(watch, "sharded")
    run(watch, "again", stop=6)
    with late_listing(2 if os.environ["RANK"] == "1" else 0):
        run(watch, "again")
    run(watch, "one to two")
    run(watch, "best", {**RUN, "train__lr": 0.3, "train__muon_lr": 1.0, "train__warmup_steps": 8})


def more(watch: Watch) -> None:
    """Other priors and precisions, full disks, and runs that other numbers of processes continue."""
    with full_disks():
        run(watch, "full", {**RUN, "train__save_every": 2})
    for name in OTHERS:
        run(watch, name, with_prior(name))
    run(watch, "two to one", stop=6)
    run(watch, "two to four", stop=6)
    AcceleratorState._reset_state()
    with patch.dict(os.environ, {"ACCELERATE_MIXED_PRECISION": "bf16"}):
        run(watch, "bf16")
        run(watch, "replicated bf16", sharded=False)


@contextmanager
def late_listing(count: int) -> Iterator[None]:
    """Hide the newest `count` checkpoints, as a shared file system may do for a while."""
    listdir = os.listdir

    def listed(path: Any = ".") -> list[str]:
        names = sorted(listdir(path))
        return names[: len(names) - count] if Path(path).name == "state" else names

    with patch.object(os, "listdir", listed):
        yield


def with_prior(name: str) -> dict[str, Any]:
    """Settings of a short run of another small prior."""
    return {"train__steps": 3, "model": node_of(name)}


@contextmanager
def full_disks() -> Iterator[None]:
    """Let the first process fail to make the folder at step 4, and the second to write its shards at step 6."""
    rank, mkdir, write = os.environ["RANK"], Path.mkdir, dcp.FileSystemWriter.write_data

    def no_folder(path: Path, *rest: Any, **more: Any) -> None:
        if rank == "0" and "-step-00000004-" in str(path):
            raise OSError(errno.ENOSPC, "no room for a folder")
        mkdir(path, *rest, **more)

    def no_pieces(writer: Any, *rest: Any) -> Any:
        if rank == "1" and "-step-00000006-" in str(writer.path):
            raise OSError(errno.ENOSPC, "no room for pieces")
        return write(writer, *rest)

    with patch.object(Path, "mkdir", no_folder), patch.object(dcp.FileSystemWriter, "write_data", no_pieces):
        yield


# From outside


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("sharded")
    make_tokens(folder / "tokens")
    with one_process(), killed_at(6):
        train_prior(folder / "one to two", folder / "tokens", **RUN)
    return folder, *in_two_processes(__file__, "basic", folder)


@pytest.fixture(scope="module")
def others(pair) -> tuple[Path, dict[str, Any], str]:
    return pair[0], *in_two_processes(__file__, "more", pair[0], 280)


@pytest.fixture(scope="module")
def alone(pair) -> Path:
    """The same run in one process."""
    with one_process():
        return train_prior(pair[0] / "alone", pair[0] / "tokens", **RUN)


def assert_same_run(run: Path, expected: Path) -> None:
    """Compare every figure, and at the end all tensors of the checkpoint and of the snapshot."""
    for name in FIGURES:
        values = losses(expected, name)
        assert len(values) == (STEPS if "/" not in name else 4 if name[0] == "v" else 1)
        factor = 10 if name == "gradient_norm" else 1
        assert losses(run, name) == pytest.approx(values, rel=factor * TOLERANCE), name
    for part in ("pipeline", "state/step-00000008"):
        assert_near(tensors(run / part), tensors(expected / part), 1e-4, 5e-6)


def test_sharded_weights_train_as_unsharded_ones(pair, alone):
    """Even by Muon, which needs whole matrices."""
    folder, _, printed = pair
    assert_same_run(folder / "sharded", alone)
    assert "/sharded: starting; 28,420 parameters, 72 training rows, 24 for validation, 2 processes on " in printed
    assert printed.count("2 processes on cpu:0, no mixed precision, weights sharded") == 5
    assert losses(alone)[-1] < losses(alone)[0]
    momenta = [key for key in tensors(states(folder / "sharded")[-1]) if key.endswith("/momentum")]
    assert len(momenta) == 8  # four in each of two blocks


def test_every_process_holds_half_of_everything(pair):
    """Half of the weights, of their average and of the moments; both halves change at every step."""
    steps = pair[1]["sharded"]["steps"]
    for name in ("weights", "average", "moments"):
        assert len({one[name] for one, _ in steps} | {two[name] for _, two in steps}) == 2 * STEPS
    for one, two in steps:
        assert not one["replicated"] and not two["replicated"] and one["batch"] != two["batch"]
        for first, second in zip(one["shares"], two["shares"], strict=True):
            assert 0.4 < second <= first < 0.6 and first + second == pytest.approx(1)


def test_both_evaluate_the_sharded_average_on_their_share_of_the_batches(pair):
    rounds = list(zip(*pair[1]["sharded"]["evaluations"], strict=True))
    assert [one["split"] for one, _ in rounds] == ["validation"] * 4 + ["held_out"]
    for one, two in rounds:
        assert one["in pieces"] and two["in pieces"] and one["figures"] == two["figures"]
        assert [one["shares"], two["shares"]] == [[[3, 5]], [[2, 5]]]


def test_the_best_weights_are_delivered_unsharded(pair):
    run = pair[0] / "best"
    pipeline = ImagePipeline.from_pretrained(run / "pipeline")
    assert not any(isinstance(value, DTensor) for value in pipeline.prior.parameters())
    bits = losses(run, "validation/bits_per_token")
    best = bits.index(min(bits))
    assert best < 3 and pipeline.provenance["prior"]["best_step"] == 2 * (best + 1)
    held_out = load_tokens(str(pair[0] / "tokens")).splits["test"]
    assert bits_per_token(pipeline.prior, held_out) == pytest.approx(
        metrics(run)[-1]["held_out/bits_per_token"], rel=1e-6
    )


# Checkpoints


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(pair):
    """Even if the second process does not see the newest checkpoints yet."""
    folder, found, _ = pair
    assert exact(folder / "again") == exact(folder / "sharded")
    steps, whole = found["again"]["steps"], found["sharded"]["steps"]
    assert found["again"]["errors"] == ["Enough: "] * 2 + [""] * 2
    assert steps[:6] == whole[:6] and steps[6:] == whole[4:]
    for part in ("state/step-00000008", "pipeline"):
        assert_equal_tensors(tensors(folder / "again" / part), tensors(folder / "sharded" / part))


def test_two_processes_resume_the_run_of_one(pair, alone):
    assert_same_run(pair[0] / "one to two", alone)


@pytest.mark.slow
def test_one_process_resumes_the_run_of_two(others, alone):
    folder = others[0]
    assert states(folder / "two to one")[-1].name == "step-00000004"
    train_prior(folder / "two to one", folder / "tokens", **RUN)
    assert_same_run(folder / "two to one", alone)


@pytest.mark.slow
def test_a_full_disk_of_one_process_is_a_warning(others):
    folder, found, printed = others
    warnings = [line for line in printed.splitlines() if line.startswith("warning: not saved")]
    assert len(warnings) == 2
    assert "step 4: " in warnings[0] and "process 0: [Errno 28] no room for a folder" in warnings[0]
    assert "step 6: " in warnings[1] and "process 1: [Errno 28] no room for pieces" in warnings[1]
    assert [state.name for state in states(folder / "full")] == ["step-00000002", "step-00000008"]
    assert found["full"]["errors"] == [""] * 2 and exact(folder / "full") == exact(folder / "sharded")
    assert not list((folder / "full" / "state").glob(".*"))


# Slow combinations


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_prior_can_be_sharded(others, tmp_path, name):
    folder, found, _ = others
    alone = train_prior(tmp_path / "alone", folder / "tokens", **with_prior(name))
    if name == "masked":  # processes draw their own masks
        assert losses(folder / name) == pytest.approx(losses(alone), rel=0.2)
    else:
        assert losses(folder / name) == pytest.approx(losses(alone), rel=1e-5)
    assert all(0 < held < 1 for both in found[name]["steps"] for one in both for held in one["shares"])


@pytest.mark.slow
def test_bf16_computes_in_bfloat16_and_stores_float32(others):
    folder = others[0]
    assert losses(folder / "bf16") != losses(folder / "sharded")
    for name in ("replicated bf16", "sharded"):
        assert losses(folder / "bf16") == pytest.approx(losses(folder / name), rel=2e-2)
    assert all(value.dtype == torch.float32 for value in tensors(states(folder / "bf16")[-1]).values())


def command(tokens: Path, run: Path, options: list[str]) -> list[str]:
    """The command `accelerate launch` of stage two."""
    return launched(options, "-m", "pipelines.train_prior", *prior_arguments(run, tokens, **RUN))


@pytest.mark.slow
def test_the_shipped_configuration_shards(others, tmp_path):
    """In bf16, with two processes instead of eight GPUs."""
    options = ["--config_file", str(ROOT / "configs" / "accelerate" / "fsdp.yaml"), "--num_processes", "2"]
    printed = output_of(start(command(others[0] / "tokens", tmp_path / "run", options)))
    assert printed.count("2 processes on cpu:0, bf16 mixed precision, weights sharded") == 1, printed
    assert losses(tmp_path / "run") == losses(others[0] / "bf16")


@pytest.mark.slow
def test_four_processes_resume_a_run_of_two(others, alone):
    """The shards have other sizes, and some are empty."""
    run, four = others[0] / "two to four", ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "4", *MACHINE]
    printed = output_of(start(command(others[0] / "tokens", run, four)))
    assert "continuing from step 4;" in printed and "4 processes on cpu:0" in printed
    assert_same_run(run, alone)


# Refusals


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP 1"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train.checkpointing=true"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "train.compile=true"),
    ],
)
def test_unsupported_versions_and_options_are_refused(tmp_path, tokens, monkeypatch, variables, message):
    for name, value in {**FSDP, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        train_prior(tmp_path / "run", tokens)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_not_sharded(tmp_path):
    config = parse(TrainTokenizerConfig, tokenizer_arguments(tmp_path), verb="train_tokenizer", description=None)
    with pytest.raises(UserError, match="FSDP supports only priors"):
        require_shardable(TokenizerTask(config))


if __name__ == "__main__":
    watched_runs.main(globals())
