"""Two processes that share the weights out train as two that copy them do, and as one does; and any of them goes on
where another one stopped.

What one process can look at is in checkpoints/test_sharded.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import sharded_runs
from failures.sharded_runs import MUON, OTHERS, RUN, STEPS, TWO, until, with_prior
from launch import (
    MACHINE,
    ROOT,
    assert_equal_tensors,
    exact,
    kill_the_second,
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
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from pipelines import ImagePipeline
from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.metrics.likelihood import bits_per_token
from pipelines.tokens import load_tokens
from pipelines.train_tokenizer import TokenizerTask, TrainTokenizerConfig
from pipelines.training.sharding import require_shardable
from pipelines.training.task import Task
from tokenizer.files import verify_manifest

pytestmark = [pytest.mark.timeout(200), pytest.mark.usefixtures("one_process")]
TOLERANCE = 1e-5  # relative; 3e-7 was measured, as sums are taken in another order
FIGURES = ("loss", "bits_per_token", "gradient_norm", "validation/bits_per_token", "held_out/bits_per_token")

# From outside


def in_two_processes(name: str, folder: Path, seconds: float = 120) -> tuple[Path, dict[str, Any], str]:
    """The folder of the runs of two processes, what they noted, and what they printed."""
    paths = os.environ["PYTHONPATH"]
    command = launched(TWO, sharded_runs.__file__, name, str(folder))
    printed = output_of(start(command, PYTHONPATH=paths, PYTHONFAULTHANDLER="1"), seconds)
    found = json.loads((folder / f"{name}.json").read_text())
    assert found["world"] == 2
    return folder, found, printed


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("sharded")
    make_tokens(folder / "tokens")
    with one_process():
        until(10, lambda: train_prior(folder / "one to two", folder / "tokens", **RUN))
    return in_two_processes("basic", folder)


@pytest.fixture(scope="module")
def more(pair) -> tuple[Path, dict[str, Any], str]:
    return in_two_processes("more", pair[0], 280)


@pytest.fixture(scope="module")
def alone(pair) -> Path:
    """What one process makes of the same command."""
    with one_process():
        return train_prior(pair[0] / "alone", pair[0] / "tokens", **RUN)


def assert_same_figures(found: Path, expected: Path, tolerance: float = TOLERANCE, steps: int = STEPS) -> None:
    for name in FIGURES:
        values = losses(expected, name)
        evaluations = {"validation/bits_per_token": 2 if steps == STEPS else 1, "held_out/bits_per_token": 1}
        assert len(values) == evaluations.get(name, steps)
        assert losses(found, name) == pytest.approx(values, rel=tolerance), name


def assert_near_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected) and expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("other", ["alone", "copied"])
def test_shards_train_as_whole_weights_do(pair, alone, other):
    """As those of one process, and as those that two processes copy."""
    folder, _, printed = pair
    assert_same_figures(folder / "sharded", folder / other)
    assert_near_tensors(tensors(folder / "sharded" / "pipeline"), tensors(folder / other / "pipeline"))
    assert "/sharded: starting; 28,420 parameters, 72 training rows, 24 for validation, 2 processes on " in printed
    assert printed.count("weights sharded") == 7 and printed.count("2 processes") == 8  # but for the copied one
    assert losses(alone)[-1] < losses(alone)[0]


def test_every_process_holds_half_of_everything(pair):
    """Of the weights, of their average and of the moments; and both of them move at every step."""
    steps = pair[1]["sharded"]["steps"]
    for name in ("weights", "average", "moments"):
        assert len({one[name] for one, _ in steps} | {two[name] for _, two in steps}) == 2 * STEPS
    for one, two in steps:
        assert not one["wrapped"] and not two["wrapped"]
        assert one["units"] == two["units"] == [3, 3]  # two blocks and the rest, gathered one after the other
        for first, second in zip(one["shares"], two["shares"], strict=True):
            assert 0.4 < second <= first < 0.6 and first + second == pytest.approx(1)
    assert all(one["wrapped"] and set(one["shares"]) == {-1.0} for one, _ in pair[1]["copied"]["steps"])


def test_shards_move_by_muon_as_whole_weights_do(pair, tmp_path):
    """Interrupted in between, too; and each process holds half of the momenta."""
    folder, found, _ = pair
    alone = train_prior(tmp_path / "alone", folder / "tokens", **MUON)
    assert_same_figures(folder / "muon", alone)
    assert_near_tensors(tensors(folder / "muon" / "pipeline"), tensors(alone / "pipeline"))
    for one, two in found["muon"]["steps"]:
        assert len({one["moments"], two["moments"]}) == 2
        assert all(0.4 < share < 0.6 for share in (*one["shares"], *two["shares"]))
    names = {key for path in states(folder / "muon")[-1].glob("optimizer-model/*") for key in load_file(path)}
    assert sum(key.endswith(".momentum") for key in names) == 8  # of each of two blocks four


def test_two_processes_see_the_order_of_one(pair):
    """Each the half of every global batch that is its own."""
    task = Task()
    task.rows = 72
    order = [task.samples(16, 0, step)[0].tolist() for step in range(2)]
    for name in ("sharded", "copied"):
        one, two = pair[1][name]["rows"]
        assert [one[:8] + two[:8], one[8:] + two[8:]] == order


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_prior_can_be_sharded(more, tmp_path, name):
    folder, found, _ = more
    alone = train_prior(tmp_path / "alone", folder / "tokens", **with_prior(name))
    if name == "masked":  # each process draws its own masks
        assert losses(folder / name) == pytest.approx(losses(alone), rel=0.2)
    else:
        assert_same_figures(folder / name, alone, steps=3)
    assert all(0 < held < 1 for both in found[name]["steps"] for one in both for held in one["shares"])


# States


def by_name(state: Path) -> dict[str, torch.Tensor]:
    """Its tensors; in a shard, they have no order."""
    return dict(sorted(tensors(state).items()))


def test_a_state_is_shards_that_the_manifest_lists(pair):
    folder, step = pair[0], STEPS
    state = states(folder / "sharded")[-1]
    manifest = verify_manifest(state)
    assert manifest["step"] == step and len(states(folder / "sharded")) == 2
    shards = [name for name in manifest["files"] if name.endswith(".safetensors")]
    kinds = ["best.safetensors", "ema", "model", "optimizer-model"]  # the best weights are whole
    assert sorted({name.split("/")[0] for name in shards}) == kinds and len(shards) == 7
    assert not [path for path in (folder / "sharded").rglob("*") if path.name.startswith((".tmp", ".del"))]
    held = []
    for number in (1, 2):
        with safe_open(next((state / "model").glob(f"shard-{number:05}*")), framework="pt") as file:
            held.append(sum(file.get_tensor(name).numel() for name in file.keys()))  # noqa: SIM118
    assert 0.4 < held[0] / sum(held) < 0.6


def test_interrupted_equals_uninterrupted(pair):
    """To the bit: figures, weights, average and moments of both processes. (It goes on from step 4, see below.)"""
    folder, found, _ = pair
    assert exact(folder / "again") == exact(folder / "sharded")
    steps = found["again"]["steps"]
    assert steps[:10] == found["sharded"]["steps"][:10] and steps[10:] == found["sharded"]["steps"][4:]
    assert_equal_tensors(*(by_name(states(folder / run)[-1]) for run in ("again", "sharded")))
    assert_equal_tensors(tensors(folder / "again" / "pipeline"), tensors(folder / "sharded" / "pipeline"))


def test_a_corrupted_shard_is_refused(pair):
    """By name, and the state before it is used, from which the same follows."""
    _, found, printed = pair
    (line,) = [line for line in printed.splitlines() if "is passed over" in line]
    assert "step-00000008" in line and f"ema/{found['corrupt shard']}" in line and "sha256" in line
    assert "continuing from step 4;" in printed


def assert_went_on(run: Path, alone: Path, sharded: bool) -> None:
    assert_same_figures(run, alone)
    assert_near_tensors(tensors(run / "pipeline"), tensors(alone / "pipeline"))
    assert (states(run)[-1] / "model").is_dir() == sharded


def test_two_go_on_where_one_stopped(pair, alone):
    assert_went_on(pair[0] / "one to two", alone, sharded=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded to copied", "copied to sharded"])
def test_others_go_on(more, alone, name):
    """With the weights whole that were in pieces; and the other way round."""
    assert_went_on(more[0] / name, alone, sharded=name == "copied to sharded")


def test_one_goes_on_where_two_stopped(pair, alone):
    folder = pair[0]
    assert (states(folder / "two to one")[-1] / "model").is_dir()
    train_prior(folder / "two to one", folder / "tokens", **RUN)
    assert_same_figures(folder / "two to one", alone)
    assert_near_tensors(by_name(states(folder / "two to one")[-1]), by_name(states(alone)[-1]))


@pytest.mark.slow
def test_a_full_disk_of_one_is_a_warning_for_both(more):
    """That it is the second one's, or comes with the snapshot, holds up neither; older states stay."""
    folder, _, printed = more
    warnings = [line for line in printed.splitlines() if line.startswith("warning: not saved")]
    assert len(warnings) == 2
    assert "step 4: " in warnings[0] and "process 1: [Errno 28] no room for shards" in warnings[0]
    assert "step 8: " in warnings[1] and "[Errno 28] no room for a snapshot" in warnings[1]
    assert [state.name for state in states(folder / "full")] == ["step-00000012"]
    assert exact(folder / "full") == exact(folder / "sharded")
    assert not list((folder / "full" / "state").glob(".*"))


# What is left to the user


def test_the_pipeline_is_whole(pair):
    """It loads as any other, and says of the held-out split what the run said."""
    folder = pair[0]
    pipeline = ImagePipeline.from_pretrained(folder / "sharded" / "pipeline")
    assert not any(isinstance(value, DTensor) for value in pipeline.prior.parameters())
    said = metrics(folder / "sharded")[-1]["held_out/bits_per_token"]
    held_out = load_tokens(str(folder / "tokens")).splits["test"]
    assert bits_per_token(pipeline.prior, held_out) == pytest.approx(said, rel=1e-6)


@pytest.mark.slow
def test_checkpointed_shards_draw_the_same_dropout(more):
    """With micro-batches, and orders that are drawn, too."""
    folder = more[0]
    assert losses(folder / "busy") == losses(folder / "checkpointing")
    assert_equal_tensors(tensors(folder / "busy" / "pipeline"), tensors(folder / "checkpointing" / "pipeline"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compiled", "copied compiled"])
def test_compiled_and_checkpointed_blocks_train_alike(more, alone, name):
    assert_same_figures(more[0] / name, alone, tolerance=1e-4)
    assert list(tensors(more[0] / name / "pipeline")) == list(tensors(alone / "pipeline"))


@pytest.mark.slow
def test_bf16_is_computed_in_and_float32_is_kept(more):
    folder, found, _ = more
    assert losses(folder / "bf16") != losses(folder / "sharded")
    assert losses(folder / "bf16") == pytest.approx(losses(folder / "copied bf16"), rel=2e-2)
    assert losses(folder / "bf16") == pytest.approx(losses(folder / "sharded"), rel=2e-2)
    assert all(value.dtype == torch.float32 for value in tensors(states(folder / "bf16")[-1] / "model").values())
    assert len({one["weights"] for one, _ in found["bf16"]["steps"]}) == STEPS


# What is refused


def test_fsdp_1_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    make_tokens(tmp_path / "tokens")
    for version in (None, "1"):
        if version:
            monkeypatch.setenv("FSDP_VERSION", version)
        with pytest.raises(UserError, match="FSDP 1 is not supported: use --fsdp_version 2"):
            train_prior(tmp_path / "run", tmp_path / "tokens")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "use train.checkpointing=true instead"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "use train.compile=true instead"),
    ],
)
def test_what_the_project_does_itself_is_said(tmp_path, monkeypatch, name, value, message):
    for key, given in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", name: value}.items():
        monkeypatch.setenv(key, given)
    make_tokens(tmp_path / "tokens")
    with pytest.raises(UserError, match=message):
        train_prior(tmp_path / "run", tmp_path / "tokens")


def test_a_tokenizer_is_not_sharded(tmp_path):
    config = parse(TrainTokenizerConfig, tokenizer_arguments(tmp_path), verb="train_tokenizer", description=None)
    with pytest.raises(UserError, match="FSDP is for priors: a tokenizer .* is kept whole by every process"):
        require_shardable(TokenizerTask(config))


# The documented command


def command(tokens: Path, run: Path, options: list[str], **more: Any) -> list[str]:
    """`accelerate launch` of the prior."""
    return launched(options, "-m", "pipelines.train_prior", *prior_arguments(run, tokens, **{**RUN, **more}))


@pytest.mark.slow
def test_the_command_shards(pair, tmp_path):
    folder = pair[0]
    printed = output_of(start(command(folder / "tokens", tmp_path / "run", TWO)))
    assert printed.count("2 processes on cpu:0, no mixed precision, weights sharded") == 1, printed
    assert exact(tmp_path / "run") == exact(folder / "sharded")


@pytest.mark.slow
def test_the_configuration_of_the_project_shards(more, tmp_path):
    """bf16, as it says; two processes instead of eight GPUs."""
    options = ["--config_file", str(ROOT / "configs" / "accelerate" / "fsdp.yaml"), "--num_processes", "2"]
    printed = output_of(start(command(more[0] / "tokens", tmp_path / "run", options)))
    assert printed.count("2 processes on cpu:0, bf16 mixed precision, weights sharded") == 1, printed
    assert exact(tmp_path / "run") == exact(more[0] / "bf16")


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(pair, tmp_path):
    """kill -9 of the second process ends the first; the same command ends where the uninterrupted run did."""
    folder, run = pair[0], tmp_path / "run"
    process = start(command(folder / "tokens", run, TWO))
    kill_the_second(process, lambda: (run / "metrics.jsonl").exists() and len(states(run)) == 2)
    printed = output_of(start(command(folder / "tokens", run, TWO)))
    assert "continuing from step" in printed
    assert exact(run) == exact(folder / "sharded")
    assert_equal_tensors(*(by_name(states(place)[-1]) for place in (run, folder / "sharded")))


@pytest.mark.slow
def test_four_go_on_where_two_stopped(more, alone):
    """In pieces of other sizes, some of them empty."""
    run, four = more[0] / "two to four", [*TWO[:3], "--num_processes", "4", *MACHINE]
    printed = output_of(start(command(more[0] / "tokens", run, four)))
    assert "continuing from step 8;" in printed and "4 processes on cpu:0" in printed
    assert_same_figures(run, alone)
    assert len(list((states(run)[-1] / "model").glob("shard-*"))) == 4


@pytest.mark.slow
def test_a_tokenizer_is_not_sharded_by_command(tmp_path):
    argv = tokenizer_arguments(tmp_path / "run")
    printed = output_of(start(launched(TWO, "-m", "pipelines.train_tokenizer", *argv)), code=None)
    assert "error: FSDP is for priors" in printed and 'pipelines/training/loop.py", line' not in printed
    assert not (tmp_path / "run").exists()
