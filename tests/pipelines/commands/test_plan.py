"""The plan of a run against real runs (bytes, FLOPs, files), against published sizes, and as a user sees it.

Covers: pipelines/planning/budget.py, pipelines/planning/costs.py, pipelines/planning/facts.py,
pipelines/planning/forecast.py, pipelines/planning/paper.py.
"""

from __future__ import annotations

import gc
import json
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launch import make_tokens, prior_arguments, states, tokenizer_arguments, train_prior, train_tokenizer
from one_process import begin_anew
from small import PRIORS, SMALL, TOKENIZERS, make_tokenizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pipelines.__main__ import main
from pipelines.commands import plan
from pipelines.config.command import parse
from pipelines.metrics.likelihood import bits_per_token, rows_at_a_time
from pipelines.metrics.reconstruction import evaluate_reconstruction, images_at_a_time, reconstruction_picture
from pipelines.planning.budget import GPUS, at_evaluation, memory, shapes_of, sharded, sizes_of
from pipelines.planning.costs import Recipe, Turn, checkpoint_blocks, flops_of, prior_turn, tokenizer_turn
from pipelines.planning.paper import ON_FLOAT32, CUDAKernels, Ledger, address, on_paper
from pipelines.tokens import load_tokens
from pipelines.train_prior import PriorTask, TrainPriorConfig
from pipelines.train_tokenizer import TrainTokenizerConfig
from pipelines.training.loop import batches
from pipelines.training.processes import build_accelerator
from pipelines.training.saving import whole_average
from pipelines.training.starting import set_up
from pipelines.training.step import take_step
from prior import Prior
from tokenizer import TokenGrid, Tokenizer
from tokenizer.quantizers import Quantizer

ROOT = Path(__file__).parents[3]
GPT_PRESET = "configs/prior/gpt_imagenet256.yaml"
VQGAN_PRESET = "configs/tokenizer/vqgan_imagenet256.yaml"
IMAGENET = ["grid=[16,16]", "vocab_size=16384", "classes=1000", "rows=1281167"]
# Sun et al. 2024: width, depth, heads, and how many parameters they say it has.
LLAMAGEN = {
    "B": (768, 12, 12, "111M"),
    "L": (1024, 24, 16, "343M"),
    "XL": (1280, 36, 20, "775M"),
    "XXL": (1536, 48, 24, "1.4B"),
    "3B": (3200, 24, 32, "3.1B"),
}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch, one_process):
    """Presets are named as in the documentation."""
    monkeypatch.chdir(ROOT)


def planned(*argv: str) -> plan.Forecast:
    """The figures of a command line."""
    return plan.main(list(argv))


def make(name: str, grid: TokenGrid | None = None, **config) -> Prior:
    """A small prior in training mode."""
    grid = grid or TokenGrid((6, 5), 40)
    return Prior.create(name, grid=grid, num_classes=3, **{**SMALL.get(name, {}), **config}).train()


def on_meta(name: str, **config) -> Prior:
    """The same without storage."""
    with torch.device("meta"):
        return make(name, **config)


# Against real tensors


CASES = [*((name, {}) for name in PRIORS), ("gpt", {"depth": 3, "dim": 48, "heads": 4, "dropout": 0.1})]
QUICK = ("gpt", "pixelcnn")
every_case = pytest.mark.parametrize(
    ("name", "config"),
    [pytest.param(*case, marks=() if case in [(name, {}) for name in QUICK] else pytest.mark.slow) for case in CASES],
    ids=str,
)
every_precision = pytest.mark.parametrize(
    "bf16", [pytest.param(False, id="float32", marks=pytest.mark.slow), pytest.param(True, id="bf16")]
)


def kept_by_autograd(model: Prior, count: int, bf16: bool) -> int:
    """Bytes of the storages that a real forward pass saves for the backward pass, beside the model's own."""
    own = {address(t) for t in (*model.parameters(), *model.buffers())}
    tokens, held = torch.zeros(count, *model.grid.shape, dtype=torch.long), {}

    def pack(tensor):
        held[address(tensor)] = tensor.untyped_storage()
        return tensor

    with CUDAKernels(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs = model.training_inputs(tokens, 0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(tokens, torch.zeros(count, dtype=torch.long), **inputs)
    return sum(storage.nbytes() for key, storage in held.items() if key not in own)


@every_precision
@every_case
def test_bytes_on_paper_are_those_of_a_real_run(name, config, bf16):
    """The ledger reads the same for tensors without storage, and what it calls activations is what autograd keeps, but
    for the ids, orders and masks that came in, and the head's cast weights, which are gone at the worst moment."""
    model, count = make(name, **config), 7
    with on_paper(paper := on_meta(name, **config)):
        turn = prior_turn(paper, count, bf16)
    assert turn == prior_turn(model, count, bf16)
    assert turn.parts["logits"] == 4 * count * 30 * 40  # float32, as accelerate makes them
    kept, inputs = kept_by_autograd(model, count, bf16), 8 * count * 6 * 5
    assert -2 * 64 * 40 * bf16 <= turn.parts["activations"] + turn.casts - kept <= 3 * inputs


@every_precision
def test_the_peak_is_that_of_the_allocator(bf16):
    """What torch's own CPU allocator hands out at most in a real step is what the ledger adds up, but for 0.1 %."""
    model = Prior.create("gpt", grid=TokenGrid((8, 8), 512), dim=64, depth=3, heads=2, dropout=0.1).train()

    def step():
        tokens = torch.zeros(16, 8, 8, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(tokens, torch.zeros(16, dtype=torch.long))
        logits = logits.float()
        loss = model.loss(logits, tokens)
        del logits
        loss.backward()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with CUDAKernels(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            peak = max(peak, now := now + event.nbytes())
    with on_paper(paper := meta_copy(model)):
        turn = prior_turn(paper, 16, bf16)
    assert peak > 5e6 and sum(turn.parts.values()) + turn.working + turn.casts == pytest.approx(peak, rel=1e-3)


def meta_copy(model: Prior) -> Prior:
    """A model of the same configuration without storage."""
    with torch.device("meta"):
        return type(model)(model.config).train()


def test_kernels_keep_what_those_of_cuda_keep():
    """Beside the output: of dropout a byte per element, of RMSNorm a number per row; of attention with dropout, whose
    kernel on a CPU would keep all weights, the output and a number per row and head."""

    def kept(run, size):
        x = torch.zeros(2, 3, 16, 8, requires_grad=True)
        with CUDAKernels(), Ledger({address(x)}) as ledger:
            out = run(x)
        assert out.shape == x.shape
        return ledger.now - size

    with FakeTensorMode():
        assert kept(lambda x: F.dropout(x, 0.1), 4 * 768) == 768
        assert kept(lambda x: F.rms_norm(x, (8,)), 4 * 768) == 4 * 96
        flash = kept(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1, is_causal=True), 4 * 768)
        assert 4 * 96 <= flash <= 4 * 96 + 32  # and what the generator is at
        with torch.autocast("cpu", torch.bfloat16):
            kept_in_float32 = 4 * 768 + 2 * 4 * 6  # the input, and two numbers for each image and group
            assert kept(lambda x: F.group_norm(x.bfloat16(), 3), 4 * 768) == kept_in_float32


@pytest.mark.slow
def test_micro_batches_take_less_at_a_time(capsys):
    half = planned(*TINY, "gpus=2", "train.batch_size=32")
    parts = planned(*TINY, "gpus=2", "train.batch_size=64", "train.accumulate=2")
    assert half.turns == parts.turns and half.hours == parts.hours / 2
    # What else there is, is a copy of the gradients, of DDP.
    assert half.memory == {
        way: {**found, "gradients not yet sent": 0} if "DDP" in way else found for way, found in parts.memory.items()
    }
    assert parts.memory["DDP"]["gradients not yet sent"] == parts.memory["DDP"]["gradients"]


@pytest.mark.parametrize("name", ["gpt", pytest.param("masked", marks=pytest.mark.slow)])
def test_checkpointed_blocks_keep_their_inputs_alone(name):
    sizes = {}
    for depth in (1, 2, 5):
        with on_paper(model := on_meta(name, depth=depth)):
            checkpoint_blocks(list(model.blocks))
            sizes[depth] = prior_turn(model, 7, False).parts["activations"]
    stream = 7 * 30 * 32 * 4  # a float32 residual stream of 7 images
    assert sizes[5] - sizes[2] == 3 * (sizes[2] - sizes[1]) == 3 * stream


def test_checkpointing_changes_neither_gradients_nor_kernels():
    model, labels = make("gpt"), torch.zeros(4, dtype=torch.long)
    tokens = torch.randint(40, (4, 6, 5))
    gradients = []
    for _ in range(2):
        with CUDAKernels():
            model.loss(model(tokens, labels), tokens).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
        checkpoint_blocks(list(model.blocks))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_case
def test_flops_are_those_of_a_real_run(name, config):
    model = make(name, **config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokens = torch.zeros(1, 6, 5, dtype=torch.long)
        inputs = model.training_inputs(tokens, 0.5)
        logits = model(tokens, torch.zeros(1, dtype=torch.long), **inputs)
        model.loss(logits, tokens, **inputs).backward()
    with on_paper(paper := on_meta(name, **config)):
        assert flops_of(lambda: prior_turn(paper, 1, True)) == counter.get_total_flops()


def test_flops_of_a_gpt_are_the_closed_formula():
    """Three times forward, which is 2 for each weight of a matrix and token, and 4 N dim a block and token."""
    dim, depth, size, ids, hidden = 64, 3, 48, 100, 192
    with torch.device("meta"):
        model = Prior.create("gpt", grid=TokenGrid((6, 8), ids), dim=dim, depth=depth, heads=4, hidden=hidden)
    with on_paper(model):
        found = flops_of(lambda: prior_turn(model, 1, True))
        checkpoint_blocks(list(model.blocks))
        again = flops_of(lambda: prior_turn(model, 1, True))
    block = size * (2 * (4 * dim**2 + 3 * dim * hidden) + 4 * size * dim)
    assert found == 3 * (depth * block + 2 * size * dim * ids)
    assert again == found + depth * (block - 2 * size * dim * hidden)  # a block's last product is not needed again


def test_what_autocast_leaves_in_float32_is_what_torch_says():
    """The list of CUDA's autocast in the headers that torch installs."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    if not header.is_file():
        pytest.skip("torch came without headers")
    text = header.read_text()
    lists = re.findall(r"#define AT_FORALL_FP32(?:_SET_OPT_DTYPE)?\(_\)(.*?)\n\n", text, re.DOTALL)
    assert len(lists) == 2
    theirs = {name for part in lists for name in re.findall(r"_\((\w+)", part)} | {"norm"}
    ours = ON_FLOAT32 - {"vector_norm", "interpolate"}  # as Python calls them
    assert ours <= theirs and "rms_norm" in theirs
    used = {"group_norm", "layer_norm", "softmax", "log_softmax", "mse_loss", "l1_loss", "exp", "log", "pow", "sum"}
    assert used <= ours


# Against a real run of the loop


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """A token dataset of 72 rows of 7 x 7 ids in 3 classes."""
    return make_tokens(tmp_path_factory.mktemp("tokens") / "tokens")


def test_memory_and_files_of_a_run_of_stage_two(tokens, tmp_path, monkeypatch):
    argv = prior_arguments(tmp_path / "run", tokens, train__steps=2, train__save_every=1)
    forecast = planned(*argv, "gpus=1", "precision=float32", "peak_tflops=1")
    parts = forecast.memory["DDP"]
    config = parse(TrainPriorConfig, argv, verb="train_prior", description=None)
    training = set_up(task := PriorTask(config), config, tmp_path / "other", build_accelerator())
    gradients = []
    optimizer = training.optimizers["model"]
    real = optimizer.step
    monkeypatch.setattr(
        optimizer, "step", lambda: (gradients.append(bytes_of(g.grad for g in task.model.parameters())), real())
    )
    stream = batches(training)
    take_step(training, next(stream), 1e-3)
    stream.close()
    training.tracker.close()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    own = [*task.model.parameters(), *task.model.buffers()]
    assert parts["weights"] == bytes_of(own) and parts["gradients"] == gradients[0]
    assert parts["AdamW's two moments"] == bytes_of(moments)
    averaged = [*training.averaged.module.parameters(), *training.averaged.module.buffers()]
    assert parts["averaged weights"] == bytes_of(averaged)
    assert forecast.sizes.parameters == sum(p.numel() for p in task.model.parameters())
    begin_anew()
    run = train_prior(tmp_path / "run", tokens, train__steps=2, train__save_every=1)
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
    """Sizes on the disk, but for names and headers: a kilobyte for each tensor and some pages of text."""
    sizes = {path.name: sum(file.stat().st_size for file in path.iterdir()) for path in states(run)}
    assert len(sizes) == 2  # as the page says
    slack = 3_000 * len(forecast.sizes.shapes) + 10_000
    assert 0 <= sizes["step-00000002"] - forecast.sizes.state <= slack, (sizes, forecast.sizes.state)
    weights = sum(file.stat().st_size for file in (run / snapshot).rglob("*.safetensors"))
    assert 0 <= weights - forecast.snapshot <= slack


def test_facts_come_from_the_token_dataset(tokens, capsys):
    argv = prior_arguments(Path("x"), tokens)
    forecast = planned(*argv)
    assert forecast.rows == 72 and forecast.tokens_per_image == 49
    with torch.device("meta"):
        model = Prior.create("gpt", grid=TokenGrid((7, 7), 16), num_classes=3, dim=32, depth=2, heads=2)
    assert forecast.sizes.parameters == sum(p.numel() for p in model.parameters())
    assert (tokens / "train.safetensors").stat().st_size - forecast.dataset < 1000
    what_if = parse(plan.PlanPriorConfig, [*argv, "rows=1000"], verb="plan", description=None)
    assert plan.facts_of(what_if, None).rows == 1000


# FSDP


def test_shards_are_those_of_fsdp(monkeypatch):
    """torch's own `fully_shard` on eight processes that are only pretended: what the first one keeps."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = make("gpt", dim=48, heads=3)
    planned_numbers = {gpus: sharded(shapes_of(model), gpus) for gpus in (1, 2, 8)}
    assert planned_numbers[1] == sum(p.numel() for p in model.parameters())
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (8,))
        for block in model.blocks:
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
    average, sent = nn.Linear(2, 2), []
    monkeypatch.setattr(average, "to", lambda device: (sent.append(device), average)[1])
    training: Any = SimpleNamespace(
        sharded=True,
        averaged=SimpleNamespace(module=nn.Linear(2, 2)),
        gathered=average,
        accelerator=SimpleNamespace(device="gpu"),
    )
    for _ in range(2):
        with whole_average(training) as found:
            assert found is average and sent == ["gpu"]
            assert torch.equal(average.weight, training.averaged.module.weight)
        assert sent == ["gpu", "cpu"] and not sent.clear()
    with pytest.raises(KeyError), whole_average(training):
        raise KeyError
    assert sent == ["gpu", "cpu"]
    training.gathered = None  # another process than the main one
    with whole_average(training) as found:
        assert found is None and sent == ["gpu", "cpu"]


def test_fsdp_divides_what_is_kept_and_nothing_else():
    model = on_meta("gpt")
    sizes = sizes_of({}, model, {"model": model}, list(model.blocks), False)
    with on_paper(paper := on_meta("gpt")):
        turns = [prior_turn(paper, 8, True)]
    one, four = memory(sizes, turns, 4), memory(sizes, turns, 4, fsdp=True)
    for part in ("gradients", "AdamW's two moments"):
        assert one[part] / 4 <= four[part] < one[part] / 3  # some axes do not divide
    assert one["activations"] == four["activations"] and one["logits"] == four["logits"]
    kept = sum(four[part] for part in ("weights", "AdamW's two moments", "averaged weights"))
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
        if part in ("weights", "gradients", "AdamW's two moments", "averaged weights")
    )
    assert forecast.evaluating("DDP") == kept + forecast.costs.evaluation == forecast.needs("DDP")
    assert f"{forecast.evaluating('DDP') / 1e9:.2f}" in capsys.readouterr().out


class Images(list):
    """Images `(n, C, H, W)` as a data set."""

    image_shape = (3, 16, 8)

    def batch(self, rows) -> torch.Tensor:
        return torch.stack([self[int(row)] for row in rows])


def test_an_evaluation_takes_as_many_at_a_time_as_fit(monkeypatch, tokens):
    """256 of what is small, as ever; and figures and pictures do not depend on it but for rounding."""
    assert [rows_at_a_time(TokenGrid(s, v)) for s, v in (((7, 7), 64), ((32, 32), 1024), ((16, 16), 16384))] == [
        256,
        256,
        64,
    ]
    assert rows_at_a_time(TokenGrid((64, 64), 1 << 18)) == 1
    assert [images_at_a_time((3, s, s)) for s in (28, 64, 96, 256, 2048)] == [256, 256, 113, 16, 1]
    split, model = load_tokens(str(tokens)).splits["test"], make("gpt", grid=TokenGrid((7, 7), 16)).eval()
    tokenizer = make_tokenizer("vqgan", (16, 8)).eval()
    held_out: Any = Images(torch.rand(11, 3, 16, 8) * 2 - 1)
    found, sizes = [], []
    for owner, name in ((model, "log_prob"), (tokenizer, "encode")):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda rows, *rest, real=real, **more: (sizes.append(len(rows)), real(rows, *rest, **more))[1]
        )
    for logits, pixels in ((1 << 28, 1 << 20), (5 * 49 * 16, 3 * 128)):
        monkeypatch.setattr("pipelines.metrics.likelihood.LOGITS", logits)
        monkeypatch.setattr("pipelines.metrics.reconstruction.EVALUATED_PIXELS", pixels)
        found.append(
            {
                "bits": bits_per_token(model, split),
                **evaluate_reconstruction(tokenizer, held_out),
                "picture": float(reconstruction_picture(tokenizer, held_out).mean()),
            }
        )
    assert sizes == [24, 11, 11, 5, 5, 5, 5, 4, *(3, 3, 3, 2) * 2]
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0]["psnr"] > 0


# Against what is published


@pytest.mark.parametrize("size", LLAMAGEN)
def test_parameters_of_llamagen(size, capsys):
    """Theirs by their code: no QK gains, no embeddings of start and axes, and SwiGLU's width is a multiple of 256."""
    dim, depth, heads, published = LLAMAGEN[size]
    hidden = -(-int(8 * dim / 3) // 256) * 256
    theirs = 1001 * dim + 2 * 16384 * dim + depth * (4 * dim**2 + 3 * dim * hidden + 2 * dim) + dim
    shown = f"{theirs / 1e6:.0f}M" if theirs < 1e9 else f"{theirs / 1e9:.1f}B"
    assert shown == published
    model = plan.on_meta(
        lambda: Prior.create(
            "gpt", grid=TokenGrid((16, 16), 16384), num_classes=1000, dim=dim, depth=depth, heads=heads, hidden=hidden
        )
    )
    ours = sum(p.numel() for p in model.parameters())
    assert ours - theirs == dim + (16 + 16) * dim + depth * heads  # start, axes, gains
    table = (ROOT / "docs" / "scaling.md").read_text()
    assert f"{theirs:,}" in table and f"{ours:,}" in table


def test_parameters_of_the_published_tokenizer():
    """LlamaGen's VQ-16 has 72 million."""
    config = parse(plan.PlanTokenizerConfig, ["--config", VQGAN_PRESET], verb="plan", description=None)
    tokenizer = plan.on_meta(lambda: plan.tokenizer_of(config))
    assert f"{sum(p.numel() for p in tokenizer.parameters()) / 1e6:.0f}" == "72"


# The page


@pytest.mark.parametrize("depth", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_page_of_a_prior(depth, capsys):
    forecast = planned("--config", GPT_PRESET, "gpus=8", "gpu=a100", f"model.depth={depth}", *IMAGENET)
    page = capsys.readouterr().out
    check_page(page)
    assert depth == 1 or (forecast.sizes.parameters == 110_913_936 and "110,913,936" in page)
    assert forecast.share == 32 and "299.7 epochs" in page
    flops = 3 * 256 * (2 * (depth * (4 * 768**2 + 3 * 768 * 2048) + 768 * 16384) + 4 * depth * 256 * 768)
    assert forecast.costs.work.flops == flops and forecast.flops_per_step == 256 * flops
    assert forecast.hours == pytest.approx(1_500_000 * 256 * flops / (8 * 312e12 * 0.4) / 3600)
    assert forecast.dataset == 1281167 * (512 + 8)
    assert "warning" not in page


@pytest.mark.slow
def test_twice_as_many_gpus_and_a_tokenizer_to_ask(capsys):
    small = ["--config", GPT_PRESET, "model.depth=1", "classes=1000", "gpu=a100"]
    one = planned(*small, "gpus=8", "grid=[16,16]", "vocab_size=16384", "rows=100")
    two = planned(*small, "gpus=16", f"tokenizer={VQGAN_PRESET}")
    assert one.sizes == two.sizes and two.rows is None and two.share == one.share / 2
    assert two.hours == pytest.approx(one.hours / 2)
    assert two.costs.work.turns[0].parts["activations"] == pytest.approx(
        one.costs.work.turns[0].parts["activations"] / 2, rel=0.01
    )
    assert two.snapshot - one.snapshot == pytest.approx(4 * 71_883_403, rel=0.01)
    assert "warning: rows: not known" in capsys.readouterr().out


def check_page(page: str) -> None:
    """It fits a terminal, columns are aligned, and parts add up."""
    lines = page.splitlines()
    assert max(map(len, lines)) <= 110 and not [line for line in lines if line != line.rstrip()]
    start = next(n for n, line in enumerate(lines) if line.startswith("memory"))
    header, *table = lines[start + 1 : lines.index("", start)]
    wide = max(len(re.split(r" {2,}", line.strip())[0]) for line in table) + 2
    ends = {match.end() for line in table for match in re.finditer(r"[\d.]+%?(?= |$)|yes|no(?= |$)", line[wide:])}
    ways = list(re.finditer(r"\S+(?:,? \S+)*", header))
    assert ends == {way.end() - wide for way in ways}
    cells = {line[:wide].strip(): line[wide : ways[0].end()].strip() for line in table[:-2]}
    first = {part: float(cell) for part, cell in cells.items() if cell}
    total = first.pop("all, in training")
    first.pop("main process, evaluating", None)
    assert total == pytest.approx(sum(first.values()), abs=0.06)


@pytest.mark.slow
def test_page_of_a_tokenizer_with_critic_and_perceptual_network(capsys):
    forecast = planned("--config", VQGAN_PRESET, "gpus=8", "gpu=a100", "rows=1281167")
    page = capsys.readouterr().out
    check_page(page)
    assert set(forecast.sizes.parts) == {"encoder", "quantizer", "decoder", "critic"}
    assert {"activations", "perceptual network", "critic"} <= set(forecast.memory["DDP"])
    assert "40.0 epochs" in page
    assert f"16 at a time, {forecast.costs.evaluation / 1e9:.1f} GB" in " ".join(SCALING.split())
    assert forecast.evaluating("DDP") < sum(forecast.memory["DDP"].values())
    assert f"| {forecast.flops_per_step * 400_000 / 1e18:.1f} EFLOP | 16% |" in SCALING


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[pt]*/*.yaml")), ids=lambda path: path.stem)
def test_every_preset_has_a_plan(path, capsys):
    facts = ["grid=[7,7]", "vocab_size=64", "classes=10"] if path.parent.name == "prior" else []
    try:
        planned("--config", str(path), "train.accumulate=1", "gpus=1", *facts)
    except SystemExit:
        assert "takes no GPU" in capsys.readouterr().err
    else:
        check_page(capsys.readouterr().out)


@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=() if name == "vq" else pytest.mark.slow) for name in Quantizer.available()]
)
def test_every_quantizer_has_a_turn(kind):
    choices = {**SMALL["vqgan"], "quantizer": {"kind": kind, **SMALL.get(kind, {})}}
    assert check_turn("vqgan", choices) > 0


@pytest.mark.slow
def test_every_tokenizer_has_a_turn_or_takes_no_gpu(capsys):
    trained = []
    for kind in TOKENIZERS:
        if plan.on_meta(lambda: count_trained(kind)):  # noqa: B023
            check_turn(kind, SMALL.get(kind, {}))
            trained.append(kind)
            continue
        with pytest.raises(SystemExit):
            planned(f"model={json.dumps({'kind': kind, **SMALL.get(kind, {})})}", "data.image_size=16")
        assert f"error: model.kind: a {kind} tokenizer has no weights to train" in capsys.readouterr().err
    assert set(trained) >= {"vqvae", "vqgan", "vit", "klvae"}


def count_trained(kind: str) -> int:
    model = make_tokenizer(kind, (16, 8))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def check_turn(kind: str, choices) -> int:
    """Bytes of activations on paper: about twice as many for twice the images, and hardly more than in a real run."""
    turns = []
    for count, paper in ((4, True), (8, True), (4, False)):
        with torch.device("meta") if paper else nullcontext():
            model = Tokenizer.create(kind, image_size=(16, 8), channels=3, **choices)
        recipe = Recipe(model, {"l1": 0.0, "l2": 1.0, **model.loss_weights})
        if not paper:
            model(torch.randn(32, *model.image_shape))  # its codebook starts
        with on_paper(model) if paper else nullcontext():
            turns.append(tokenizer_turn(recipe, count, True))
    small, large, real = (turn.parts["activations"] for turn in turns)
    assert 1.4 * small < large < 2 * small
    assert small == pytest.approx(real, rel=0.05, abs=8_000)  # on a CPU, mse_loss keeps all differences
    return small


# What is warned of


def lines_of(capsys) -> str:
    return " ".join(line.strip() for line in capsys.readouterr().out.partition("warning: ")[2].splitlines())


TINY = [
    "model.kind=gpt",
    "model.dim=64",
    "model.depth=1",
    "model.heads=4",
    "grid=[8,8]",
    "vocab_size=64",
    "classes=10",
    "rows=1000",
]


def test_what_does_not_divide_and_what_does(capsys):
    planned(*TINY, "gpus=12", "train.batch_size=256")
    told = lines_of(capsys)
    assert "256 is not a multiple of gpus x train.accumulate (12 x 1)" in told and "252 or 264 is" in told
    planned(*TINY, "gpus=4", "train.accumulate=2", "train.batch_size=256")
    assert not lines_of(capsys)


@pytest.mark.slow
def test_what_does_not_fit_and_what_does(capsys):
    forecast = planned(*TINY, "gpus=4", "train.batch_size=4096", "train.accumulate=1")
    totals = {way: sum(parts.values()) / 1e9 for way, parts in forecast.memory.items()}
    assert totals["DDP"] > totals["DDP, checkpointed"] > totals["FSDP, checkpointed"]
    capsys.readouterr()
    middle = (totals["DDP, checkpointed"] + totals["FSDP"]) / 2 / 0.9
    forecast = planned(*TINY, "gpus=4", "train.batch_size=4096", f"gpu_memory={middle}")
    told = lines_of(capsys)
    assert not forecast.fits("DDP") and "what fits: DDP, checkpointed; FSDP, checkpointed" in told
    # Where nothing fits, so many images do, and hardly more.
    small = totals["FSDP, checkpointed"] * 0.5
    planned(*TINY, "gpus=4", "train.batch_size=4096", f"gpu_memory={small}")
    most = int(re.search(r"FSDP, checkpointed with ([\d,]+) images at a time", lines_of(capsys))[1].replace(",", ""))
    for count, fits in ((most, True), (most + most // 20, False)):
        again = planned(*TINY, "gpus=4", f"train.batch_size={4 * count}", f"gpu_memory={small}")
        assert again.fits("FSDP, checkpointed") == fits


# What is wrong


BAD = [
    ([], "model.kind: nothing to plan; give the command line of train_prior or train_tokenizer"),
    (["model.kind=quantum"], "model.kind: no Prior is called 'quantum'; there are"),
    (["model.kind=gpt"], "grid: missing, as no token dataset is given; give it, or tokenizer=PRESET"),
    (
        ["--config", GPT_PRESET, "classes=10"],
        "grid: missing, as token dataset 'runs/imagenet256_tokens' is not there yet",
    ),
    (["--config", GPT_PRESET, "grid=[16,16]", "vocab_size=4"], "classes: missing"),
    (["--config", GPT_PRESET, *IMAGENET, "gpus=0"], "gpus: must be >= 1 (got 0)"),
    (["--config", GPT_PRESET, *IMAGENET, "gpu=tpu"], "gpu: must be one of"),
    (["--config", GPT_PRESET, *IMAGENET, "utilization=2"], "utilization: must be <= 1 (got 2)"),
    (["--config", GPT_PRESET, *IMAGENET, "gpuss=2"], "gpuss: unknown key; did you mean 'gpus'?"),
    (["--config", GPT_PRESET, *IMAGENET, "precision=float32"], "peak_tflops: precision=float32 needs the peak"),
    (["--config", GPT_PRESET, *IMAGENET, "model.heads=7"], "heads: dim must be a multiple of 2 * heads"),
    (["--config", GPT_PRESET, *IMAGENET, "grid=[0,16]"], "grid: a grid needs positive whole sizes"),
    (["--config", GPT_PRESET, "tokenizer=nowhere", "classes=2"], "tokenizer: 'nowhere' is neither a preset"),
    (["--config", GPT_PRESET, "tokenizer=nowhere.yaml", "classes=2"], "nowhere.yaml: cannot be read"),
    (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    (["--config", VQGAN_PRESET, "data.image_size=250"], "widths: 5 levels halve 4 times"),
    (["model.kind=vqvae", "critic.weight=1", "critic.layers=6"], "critic.layers: a critic of 6 layers needs images"),
    (["model.kind=palette"], "model.kind: a palette tokenizer has no weights to train, so it takes no GPU"),
]


@pytest.mark.parametrize(
    ("argv", "told"),
    [pytest.param(*case, marks=() if n % 6 == 0 else pytest.mark.slow) for n, case in enumerate(BAD)],
    ids=lambda part: part[:30] if isinstance(part, str) else "",
)
def test_mistakes_are_told_in_lines(argv, told, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *argv])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and lines and all(line.startswith("error: ") for line in lines)
    assert any(line.startswith(f"error: {told}") or told in line for line in lines), lines


@pytest.mark.slow
def test_train_commands_are_taken_as_they_are(tmp_path, capsys):
    """Every key of the two training verbs is one of a plan, and a dry run can be given back."""
    for cls, base in ((plan.PlanPriorConfig, TrainPriorConfig), (plan.PlanTokenizerConfig, TrainTokenizerConfig)):
        assert set(base.model_fields) <= set(cls.model_fields)
        assert set(cls.model_fields) == set(base.model_fields) | set(plan.PlanConfig.model_fields)
    for preset in (GPT_PRESET, VQGAN_PRESET):
        texts = []
        for path in (preset, str(tmp_path / "again.yaml")):
            with pytest.raises(SystemExit) as ended:
                main(["plan", "--config", path, "gpus=3", "--dry-run"])
            assert not ended.value.code
            texts.append(capsys.readouterr().out)
            (tmp_path / "again.yaml").write_text(texts[-1])
        assert texts[0] == texts[1] and "gpus: 3" in texts[0]


@pytest.mark.slow
def test_nothing_is_allocated_for_three_billion_parameters():
    """In a process of its own: what it holds at most is what importing takes, and some."""
    dim, depth, heads, _ = LLAMAGEN["3B"]
    code = (
        "import re, sys\nfrom pipelines import plan\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "before = peak()\nplan.main(sys.argv[1:])\nprint('MiB', peak() - before)"
    )
    if not Path("/proc/self/status").is_file():
        pytest.skip("memory is measured as Linux counts it")
    argv = ["--config", GPT_PRESET, *IMAGENET, f"model.dim={dim}", f"model.depth={depth}", f"model.heads={heads}"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("MiB")[1]) < 600  # the weights alone would take 12,000


# The documentation


SCALING = (ROOT / "docs" / "scaling.md").read_text()
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", SCALING, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [line.partition(" #")[0].strip() for line in BLOCKS.splitlines() if line.strip() and line[0] != "#"]


def test_there_are_commands_in_the_documentation():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize(
    "command", [pytest.param(line, marks=pytest.mark.slow if n % 6 else ()) for n, line in enumerate(COMMANDS)]
)
def test_commands_of_the_documentation_are_understood(command, capsys):
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\w+", word)]
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        at = words.index("-m")
        options = launch_command_parser().parse_args(words[2 : at + 2])
        assert options.config_file is None or Path(options.config_file).is_file()
        words = ["smalti", words[at + 1].removeprefix("pipelines."), *words[at + 2 :]]
    assert words[0] == "smalti"
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], "--dry-run"])
    assert not ended.value.code, capsys.readouterr().err


SIZES = dict(zip(LLAMAGEN, [shlex.split(line)[2:] for line in COMMANDS if "train.steps=" in line], strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("size", LLAMAGEN)
def test_figures_of_the_documentation_are_those_of_the_plan(size, capsys):
    """Each row of the table is what its command prints."""
    forecast = planned(*SIZES[size])
    page = capsys.readouterr().out
    check_page(page)
    (row,) = (line for line in SCALING.splitlines() if re.match(rf"\| {size} \| \d+, \d+ \|", line))
    _, shared, token, run, *rest = (cell.strip() for cell in row.strip("|").split("|"))
    assert shared == f"{forecast.machine.gpus}, {forecast.schedule.batch_size}"
    assert re.search(rf"a token +{re.escape(token)}$", page, re.M) and re.search(
        rf"the run +{re.escape(run)}$", page, re.M
    )
    totals = [sum(parts.values()) for parts in forecast.memory.values()]
    assert rest == [f"{size / 1e9:.2f}" for size in (*totals, forecast.sizes.state)]


def test_gpus_of_the_help_are_those_of_the_table():
    assert set(plan.PlanConfig.model_fields["gpu"].annotation.__args__) == set(GPUS)
