"""The plan of a run against hand counts and real runs."""

from __future__ import annotations

import pytest
from command import fails
from givens.token_datasets import make_conditioned
from launch import prior_arguments, states, tokenizer_arguments, train_prior, train_tokenizer
from tiny_task import read_checkpoint

from pipelines.commands import plan
from pipelines.train_prior import build_prior
from prior import Prior
from tokenizer import TokenGrid

GPT = ["model.kind=gpt", "model.dim=64", "model.depth=2", "model.heads=4", "model.hidden=160"]
TINY = [*GPT, "grid=[8,8]", "vocab_size=64", "classes=10", "rows=1000", "batches=2,4"]


pytestmark = pytest.mark.usefixtures("one_process")


def planned(*argv: str) -> plan.Plan:
    return plan.main(list(argv))


def test_parameters_and_flops_of_a_small_gpt():
    """Attention counts as full products, and a backward pass as two forward passes."""
    found = planned(*TINY)
    model = Prior.create("gpt", grid=TokenGrid((8, 8), 64), num_classes=10, dim=64, depth=2, heads=4, hidden=160)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    forward = 64 * (2 * (2 * (4 * 64**2 + 3 * 64 * 160) + 64 * 64) + 4 * 2 * 64 * 64)
    assert found.flops == pytest.approx(3 * forward, rel=0.02)
    aligned = planned(*TINY, "objective=cca")  # two passes both ways, and two forward passes of a frozen copy
    assert aligned.flops == pytest.approx(8 * forward, rel=0.02)
    assert aligned.states - found.states == pytest.approx(4 * found.parameters, rel=0.01)


@pytest.mark.parametrize("argv", [TINY, ["--config", "vqvae_digits"]], ids=["prior", "tokenizer"])
def test_memory_is_extrapolated_from_small_batches(argv):
    small, large = planned(*argv, "batches=4,8"), planned(*argv, "batches=16,32")
    assert small.memory(32) - small.memory(16) == 4 * (small.memory(8) - small.memory(4)) > 0
    assert small.memory(32) == pytest.approx(large.states + large.peaks[32], rel=0.05)
    assert 0 <= small.memory(0) - small.states < 0.2 * small.memory(32)


def test_checkpointed_blocks_take_less_memory_and_more_flops():
    plain, checkpointed = planned(*TINY), planned(*TINY, "train.checkpointing=true")
    assert checkpointed.memory(64) < 0.7 * plain.memory(64) and 1.2 < checkpointed.flops / plain.flops < 1.4


@pytest.mark.parametrize("stage", ["prior", "critic"])
def test_checkpoints_have_the_size_of_a_real_run(stage, tokens, tmp_path):
    """Apart from step counts."""
    more = {"train__steps": 2, "train__save_every": 1, "train__optimizer": "muon"}
    if stage == "prior":
        found, run = planned(*prior_arguments(tmp_path / "run", tokens, **more)), train_prior
        assert found.rows == 72 and found.grid.shape == (7, 7)
        assert planned(*TINY, f"tokens={tokens}").grid == TokenGrid((8, 8), 64), "keys take precedence"
        run(tmp_path / "run", tokens, **more)
    else:
        more |= {"critic__weight": 0.5, "critic__width": 8, "critic__layers": 1}
        found = planned(*tokenizer_arguments(tmp_path / "run", **more))
        train_tokenizer(tmp_path / "run", **more)
    tensors = read_checkpoint(states(tmp_path / "run")[-1])
    assert found.checkpoint == sum(value.nbytes for name, value in tensors.items() if not name.endswith("/step"))


def test_columns_of_the_token_dataset_are_planned_for(tmp_path, capsys):
    """The FLOPs of encoding a condition are counted; `attributes` chooses the columns."""
    data = make_conditioned(8)
    data.save(tmp_path / "tokens")
    argv = prior_arguments(tmp_path / "run", tmp_path / "tokens")
    bare, age, every = (planned(*argv, *more) for more in (["attributes=[]"], ["attributes=[age]"], []))
    model = build_prior({"kind": "gpt", "dim": 32, "depth": 2, "heads": 2}, data)
    assert bare.parameters < age.parameters < every.parameters == sum(p.numel() for p in model.parameters())
    assert bare.flops < age.flops < every.flops
    assert "attributes: " in fails(capsys, "plan", *argv, "attributes=[aeg]")


def test_time_is_flops_over_the_achieved_peak():
    argv = [*TINY, "train.batch_size=64", "train.steps=100", "gpus=4", "gpu=a100", "utilization=0.25"]
    found = planned(*argv)
    assert found.flops_per_step == 64 * found.flops and found.steps == 100
    assert found.seconds_per_step == pytest.approx(64 * found.flops / (4 * 312e12 * 0.25))
    assert planned(*argv, "peak_tflops=624").seconds_per_step == pytest.approx(found.seconds_per_step / 2)
    by_clock = planned(*argv, "peak_tflops=0.001", "train.minutes=2", "train.steps=null")
    assert by_clock.steps * by_clock.seconds_per_step == pytest.approx(120, rel=0.05)


def test_what_cannot_be_planned_is_one_line(capsys):
    huge = ["model.dim=16384", "model.depth=48", "model.hidden=null"]  # 3 TB: more than this machine has
    for argv, key in (
        ([], "grid, vocab_size, classes"),
        (["model.kind=palette"], "model.kind"),
        (TINY + huge, "device"),
    ):
        assert fails(capsys, "plan", *argv).startswith(f"error: {key}:")
