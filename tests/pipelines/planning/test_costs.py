"""Costs on paper against real tensors: bytes that autograd keeps, the peak of an allocator, and FLOPs.

Covers: pipelines/planning/paper.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from givens.plans import TINY, on_meta, planned, prior_in_training
from small import PRIORS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pipelines.planning.costs import checkpoint_blocks, flops_of, prior_turn
from pipelines.planning.paper import ON_FLOAT32, CUDAKernels, Ledger, address, on_paper
from prior import Prior
from tokenizer import TokenGrid

pytestmark = pytest.mark.usefixtures("one_process")

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
    model, count = prior_in_training(name, **config), 7
    with on_paper(paper := on_meta(name, **config)):
        turn = prior_turn(paper, count, bf16)
    assert turn == prior_turn(model, count, bf16)
    size = len(model.grid)
    each = 2 if bf16 and name != "marginal" else 4  # frequencies are no product, which autocast would have in bf16
    assert turn.parts["logits"] == each * count * size * 40
    kept, inputs = kept_by_autograd(model, count, bf16), 8 * count * size
    assert -2 * 64 * 40 * bf16 <= turn.parts["activations"] + turn.casts - kept <= 3 * inputs


@every_precision
def test_a_frozen_copy_keeps_nothing(bf16):
    """On paper as in a real run: of both labels what one takes of each, but for the ids, and of the copy's passes
    nothing."""
    alone, (model, frozen) = prior_turn(prior_in_training("gpt"), 7, bf16), (prior_in_training("gpt") for _ in range(2))
    real = prior_turn(model, 7, bf16, frozen)
    with on_paper(paper := on_meta("gpt"), copy := on_meta("gpt")):
        assert prior_turn(paper, 7, bf16, copy) == real
    kept, once = sum(real.parts.values()), sum(alone.parts.values())
    ids = 8 * 7 * len(model.grid)
    assert 2 * once - ids <= kept < 2.5 * once
    assert all(parameter.grad is None for parameter in frozen.parameters())


@every_precision
def test_the_peak_is_that_of_the_allocator(bf16):
    """What torch's own CPU allocator hands out at most in a real step is what the ledger adds up, but for 0.1 %."""
    model = Prior.create("gpt", grid=TokenGrid((8, 8), 512), dim=64, depth=3, heads=2, dropout=0.1).train()

    def step():
        tokens = torch.zeros(16, 8, 8, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(tokens, torch.zeros(16, dtype=torch.long))
            loss = model.loss_from_outputs(logits, tokens)
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
    """Beside the output: of dropout a byte per element, of RMSNorm a number per row, of group normalisation two per
    image and group; of attention with dropout, whose kernel on a CPU would keep all weights, the output and a number
    per row and head."""

    def kept(run, size):
        x = torch.zeros(2, 3, 16, 8, requires_grad=True).to(memory_format=torch.channels_last)
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
            weight, bias = (torch.zeros(3, requires_grad=True) for _ in range(2))
            normalised = kept(lambda x: F.group_norm(x.bfloat16(), 3, weight, bias), 2 * 768)
            assert normalised == 2 * 4 * 6 + 2 * 4 * 3  # and what it was given: x in bf16, a cast; weight and bias


@pytest.mark.slow
def test_micro_batches_take_less_at_a_time(capsys):
    half = planned(*TINY, "gpus=2", "train.batch_size=32")
    parts = planned(*TINY, "gpus=2", "train.batch_size=64", "train.accumulate=2")
    assert half.costs.work.turns == parts.costs.work.turns and half.seconds_per_step == parts.seconds_per_step / 2
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
            checkpoint_blocks(list(model.layers))
            sizes[depth] = prior_turn(model, 7, False).parts["activations"]
    stream = 7 * 30 * 32 * 4  # a float32 residual stream of 7 images
    assert sizes[5] - sizes[2] == 3 * (sizes[2] - sizes[1]) == 3 * stream


def test_checkpointing_changes_neither_gradients_nor_kernels():
    model, labels = prior_in_training("gpt"), torch.zeros(4, dtype=torch.long)
    tokens = torch.randint(40, (4, 6, 5))
    gradients = []
    for _ in range(2):
        with CUDAKernels():
            model.loss_from_outputs(model(tokens, labels), tokens).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
        checkpoint_blocks(list(model.layers))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_case
def test_flops_are_those_of_a_real_run(name, config):
    model = prior_in_training(name, **config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokens = torch.zeros(1, *model.grid.shape, dtype=torch.long)
        inputs = model.training_inputs(tokens, 0.5)
        logits = model(tokens, torch.zeros(1, dtype=torch.long), **inputs)
        model.loss_from_outputs(logits, tokens, **inputs).backward()
    with on_paper(paper := on_meta(name, **config)):
        assert flops_of(lambda: prior_turn(paper, 1, True)) == counter.get_total_flops()


def test_flops_of_a_gpt_are_the_closed_formula():
    """Three times forward, which is 2 for each weight of a matrix and token, and 4 N dim a block and token."""
    dim, depth, size, ids, hidden = 64, 3, 48, 100, 192
    with torch.device("meta"):
        model = Prior.create("gpt", grid=TokenGrid((6, 8), ids), dim=dim, depth=depth, heads=4, hidden=hidden)
    with on_paper(model):
        found = flops_of(lambda: prior_turn(model, 1, True))
        checkpoint_blocks(list(model.layers))
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
