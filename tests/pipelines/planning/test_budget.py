"""The budget of a run against real runs of the loop, and against what FSDP and DDP keep."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from givens.plans import TINY, on_meta, planned, prior_in_training
from launch import prior_arguments, states, tokenizer_arguments, train_prior, train_tokenizer
from one_process import begin_anew
from tiny_task import read_checkpoint
from torch import nn

from pipelines.commands import plan
from pipelines.config.command import parse
from pipelines.planning.budget import at_evaluation, memory, shapes_of, sharded, sizes_of
from pipelines.planning.costs import Turn, prior_turn
from pipelines.planning.paper import address, on_paper
from pipelines.processes.launch import build_accelerator
from pipelines.train_prior import PriorTask, TrainPriorConfig
from pipelines.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_process")

# Against a real run of the loop


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def test_memory_and_files_of_a_run_of_stage_two(tokens, tmp_path, monkeypatch):
    more = {"train__steps": 2, "train__save_every": 1, "train__optimizer": "muon"}
    argv = prior_arguments(tmp_path / "run", tokens, **more)
    forecast = planned(*argv, "gpus=1", "precision=float32", "peak_tflops=1")
    parts = forecast.memory["DDP"]
    config = parse(TrainPriorConfig, argv, verb="train_prior", description=None)
    config = config.model_copy(update={"out": str(tmp_path / "other")})
    (tmp_path / "other").mkdir()
    training = Trainer(task := PriorTask(config), config, build_accelerator())
    gradients = []
    optimizer = training.optimizers["model"]
    real = optimizer.step
    monkeypatch.setattr(
        optimizer, "step", lambda: (gradients.append(bytes_of(g.grad for g in task.model.parameters())), real())
    )
    stream = training.batches()
    training.take_step(next(stream), 1e-3)
    stream.close()
    training.close()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    own = [*task.model.parameters(), *task.model.buffers()]
    assert parts["weights"] == bytes_of(own) and parts["gradients"] == gradients[0]
    assert parts["moments of the optimizer"] == bytes_of(moments) < 2 * bytes_of(task.model.parameters())
    averaged = [*training.average.parameters(), *training.average.buffers()]
    assert parts["averaged weights"] == bytes_of(averaged)
    assert forecast.sizes.parameters == sum(p.numel() for p in task.model.parameters())
    begin_anew()
    run = train_prior(tmp_path / "run", tokens, **more)
    check_files(forecast, run, "pipeline")


@pytest.mark.parametrize("critic", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_files_of_a_run_of_stage_one(tmp_path, critic, capsys):
    more = {
        "train__steps": 2,
        "train__save_every": 1,
        "critic__weight": critic,
        "critic__width": 8,
        "critic__layers": 1,
        "critic__warmup": 0,
    }
    forecast = planned(*tokenizer_arguments(tmp_path / "run", **more), "gpus=1")
    assert ("critic" in forecast.sizes.parts) == bool(critic)
    run = train_tokenizer(tmp_path / "run", **more)
    check_files(forecast, run, "tokenizer")


def check_files(forecast: plan.Forecast, run: Path, snapshot: str) -> None:
    """Sizes on the disk: of tensors to the byte, except for counts of steps; of files with what torch writes around
    each of them, and some pages of text."""
    assert len(states(run)) == 2  # as the page says
    tensors = read_checkpoint(states(run)[-1])
    counts = [value for name, value in tensors.items() if name.endswith("/step")]
    assert bytes_of(tensors.values()) - bytes_of(counts) == forecast.sizes.state
    size = sum(file.stat().st_size for file in states(run)[-1].rglob("*"))
    assert 0 <= size - forecast.sizes.state <= 2_500 * len(tensors) + 20_000
    weights = sum(file.stat().st_size for file in (run / snapshot).rglob("*.safetensors"))
    assert 0 <= weights - forecast.snapshot <= 3_000 * len(forecast.sizes.shapes) + 10_000


# FSDP


def test_shards_are_those_of_fsdp(monkeypatch):
    """torch's own `fully_shard` on eight processes that are only pretended: what the first one keeps."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = prior_in_training("gpt", dim=48, heads=3)
    planned_numbers = {gpus: sharded(shapes_of(model), gpus) for gpus in (1, 2, 8)}
    assert planned_numbers[1] == sum(p.numel() for p in model.parameters())
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (8,))
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert planned_numbers[8] == sum(p.to_local().numel() for p in model.parameters())
    finally:
        dist.destroy_process_group()


def storages_of_gradients(views: bool, sent: list[bool]) -> list[int]:
    """In how many storages the gradients of eight weights lie, after each of several micro-batches."""
    layers = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(8)))
    net = nn.parallel.DistributedDataParallel(layers, gradient_as_bucket_view=views)
    counts = []
    for now in sent:
        with nullcontext() if now else net.no_sync():
            net(torch.zeros(1, 16)).sum().backward()
        counts.append(len({address(parameter.grad) for parameter in layers.parameters()}))
        if now:
            layers.zero_grad()
    return counts


def test_gradients_of_ddp_are_in_its_buckets_alone():
    """And where not every micro-batch is sent, each weight has one of its own, too, until the last one is."""
    import torch.distributed as dist

    views = build_accelerator().ddp_handler.gradient_as_bucket_view
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        found = storages_of_gradients(views, [True, True, False, True])
        gc.collect()  # a model that outlives its group may hang in gloo's threads
    finally:
        dist.destroy_process_group()
    assert found == [1, 1, 8, 1]


def test_gradients_of_ddp_stay_and_micro_batches_have_their_own():
    model = on_meta("gpt")
    sizes = sizes_of({}, model, {"model": model, "again": model}, [], False)
    player = 4 * sum(p.numel() for p in model.parameters())
    turns = [Turn({"activations": 5}, 3, 2)]
    one, two, parts = memory(sizes, turns, 1), memory(sizes, turns, 2), memory(sizes, turns, 2, accumulate=2)
    assert (one["gradients"], two["gradients"], parts["gradients"]) == (player, 2 * player, 2 * player)
    assert [part["gradients not yet sent"] for part in (one, two, parts)] == [0, 0, player]
    assert memory(sizes, turns, 1, accumulate=2) == one
    evaluating = [at_evaluation(sizes, found, 7, gpus) for gpus, found in ((1, one), (2, two), (2, parts))]
    assert evaluating[1] - evaluating[0] == 2 * player and evaluating[1] == evaluating[2]


def test_the_whole_average_goes_back_when_it_was_looked_at(monkeypatch):
    """A GPU that is pretended: where the average was sent, and that each time it is brought and put away again."""
    monkeypatch.delenv("FSDP_OFFLOAD_PARAMS", raising=False)
    whole, pieces, sent = nn.Linear(2, 2), nn.Linear(2, 2), []
    monkeypatch.setattr(whole, "to", lambda device: (sent.append(device), whole)[1])
    training: Any = SimpleNamespace(
        sharded=True, average=pieces, whole=whole, device="gpu", main=True, collect_average=pieces.state_dict
    )
    for _ in range(2):
        with Trainer.whole_average(training) as found:
            assert found is whole and sent == ["gpu"]
            assert torch.equal(whole.weight, pieces.weight)
        assert sent == ["gpu", "cpu"] and not sent.clear()
    with pytest.raises(KeyError), Trainer.whole_average(training):
        raise KeyError
    assert sent == ["gpu", "cpu"]
    training.whole = None  # another process than the main one
    with Trainer.whole_average(training) as found:
        assert found is None and sent == ["gpu", "cpu"]


def test_fsdp_divides_what_is_kept_and_nothing_else():
    model = on_meta("gpt")
    sizes = sizes_of({}, model, {"model": model}, list(model.layers), False)
    with on_paper(paper := on_meta("gpt")):
        turns = [prior_turn(paper, 8, True)]
    one, four = memory(sizes, turns, 4), memory(sizes, turns, 4, fsdp=True)
    for part in ("gradients", "moments of the optimizer"):
        assert one[part] / 4 <= four[part] < one[part] / 3  # some axes do not divide
    assert one["activations"] == four["activations"] and one["logits"] == four["logits"]
    kept = sum(four[part] for part in ("weights", "moments of the optimizer", "averaged weights"))
    assert at_evaluation(sizes, four, 7, 4, fsdp=True) == kept + one["averaged weights"] + 7  # which is whole then


@pytest.mark.parametrize(("ids", "rows"), [(8192, 256), pytest.param(65536, 64, marks=pytest.mark.slow)])
def test_an_evaluation_is_counted(ids, rows, capsys):
    """A batch without a backward pass, of no more than 2^28 logits: these in float32, and their logarithms of
    probabilities."""
    forecast = planned(*TINY, f"vocab_size={ids}", "train.batch_size=2", "gpus=2")
    logits = 4 * rows * 64 * ids
    assert 2 * logits < forecast.costs.evaluation < 2.2 * logits
    kept = sum(
        size
        for part, size in forecast.memory["DDP"].items()
        if part in ("weights", "gradients", "moments of the optimizer", "averaged weights")
    )
    assert forecast.evaluating("DDP") == kept + forecast.costs.evaluation == forecast.needs("DDP")
    assert f"{forecast.evaluating('DDP') / 1e9:.2f}" in capsys.readouterr().out
