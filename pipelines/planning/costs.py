"""What a training step costs in memory and FLOPs, found on paper: tensors with shapes but no storage.

A model is built on the meta device and run as a fake one on the CPU (`torch._subclasses.FakeTensorMode`), forward and
backward, as the loop runs it: autocast to bf16, losses in float32. A ledger counts what lives, so that nothing is
assumed of a model beyond its code. Where CUDA would take another kernel than the CPU, `CUDAKernels` takes that one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from prior import Prior
from tokenizer import Tokenizer
from tokenizer.losses import total_loss

from ..metrics.perceptual import Perceptual
from ..training.adversary import Adversary

ON_FLOAT32 = frozenset(
    [
        "layer_norm",
        "group_norm",
        "rms_norm",
        "norm",
        "linalg_vector_norm",
        "vector_norm",
        "softmax",
        "log_softmax",
        "logsumexp",
        "softplus",
        "exp",
        "expm1",
        "log",
        "log2",
        "log1p",
        "log10",
        "pow",
        "rsqrt",
        "reciprocal",
        "sinh",
        "tan",
        "sum",
        "prod",
        "cumsum",
        "cumprod",
        "cdist",
        "cosine_similarity",
        "l1_loss",
        "mse_loss",
        "smooth_l1_loss",
        "huber_loss",
        "nll_loss",
        "kl_div",
        "binary_cross_entropy_with_logits",
        "interpolate",
    ]
)
"""What autocast computes in float32 on CUDA (torch's `ATen/autocast_mode.h`); on a CPU it leaves some of it in bf16.
That matrix products, convolutions and attention are cast to bf16 is alike on both."""
UNKNOWN_SHAPES: dict[str, Callable[..., Tensor]] = {
    "bincount": lambda ids, minlength=0: ids.new_zeros(minlength),
    "nonzero": lambda mask: mask.new_zeros(0, mask.ndim, dtype=torch.long),
}
"""What has a shape that depends on the data: the counts of ids, and which codes are dead (none)."""
LATE = 1 << 40  # a step at which everything plays

Parts = Iterator[tuple[str, int]]


@dataclass(frozen=True)
class Turn:
    """One player's turn on a micro-batch, in bytes beside weights and gradients: what is kept for the backward pass, by
    part; what else there is at the worst moment (`working`); and what the weights that autocast casts add to that."""

    parts: dict[str, int]
    working: int
    casts: int


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live: `now` without and `casts` with what is a cast of
    one of `weights`; and how many there were at most without (`peak`) and with these (`peak_with_casts`)."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights, self.known = weights, set(weights)
        self.now = self.peak = self.casts = self.peak_with_casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and address(args[0]) in self.weights
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.enter(tensor, cast)
        return out

    def enter(self, tensor: Tensor, cast: bool) -> None:
        """Count a storage that is not known yet, until it is freed."""
        storage, key = tensor.untyped_storage(), address(tensor)
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.change(size, cast)
        weakref.finalize(storage, self.leave, key, size, cast)

    def leave(self, key: int, size: int, cast: bool) -> None:
        """A storage was freed."""
        self.known.discard(key)
        self.change(-size, cast)

    def change(self, size: int, cast: bool) -> None:
        """So many bytes more, or fewer."""
        self.now, self.casts = self.now + size * (not cast), self.casts + size * cast
        self.peak, self.peak_with_casts = max(self.peak, self.now), max(self.peak_with_casts, self.now + self.casts)


def address(tensor: Tensor) -> int:
    """What tells storages apart while they live."""
    return tensor.untyped_storage()._cdata


class CUDAKernels(TorchFunctionMode):
    """On a CPU, what CUDA would keep: dropout a mask of bools, RMSNorm its input and a number per row, attention its
    inputs, its output and a number per row whether there is dropout or not; and autocast's list of float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        cast = torch.is_autocast_enabled("cpu")
        if cast and name in ON_FLOAT32:
            args, kwargs = tree_map_only(Tensor, as_float32, (args, kwargs))
        if name == "dropout":
            return dropout(*args, **kwargs)
        if name == "rms_norm":
            return rms_norm(*args, **kwargs)
        if name == "__int__" and isinstance(args[0], FakeTensor):
            return 1  # the steps of a codebook, which starts at step 0 as depends on the data; or a seed
        if name in UNKNOWN_SHAPES and isinstance(args[0], FakeTensor):
            return UNKNOWN_SHAPES[name](*args, **kwargs)
        if name == "scaled_dot_product_attention" and kwargs.get("dropout_p"):
            q, k, v = (t.to(torch.bfloat16) if cast else t for t in args[:3])
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(q, k, v, kwargs["dropout_p"], kwargs.get("is_causal", False))[0]
        return func(*args, **kwargs)


def as_float32(tensor: Tensor) -> Tensor:
    """`tensor`, cast if it is bf16."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """The kernel that keeps a mask of bools."""
    return torch.native_dropout(input, p, True)[0] if training and p else input


def rms_norm(input: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """The fused kernel."""
    return torch.ops.aten._fused_rms_norm(input, list(shape), weight, eps)[0]


# Models without storage ---------------------------------------------------------------------------


@contextmanager
def on_paper(*models: nn.Module) -> Iterator[None]:
    """In here nothing is allocated, and `models`, built on the meta device, are fake ones on the CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in [module for model in models for module in model.modules()]:
            for tensors in (module._parameters, module._buffers):
                for name, old in tensors.items():
                    if old is not None:
                        tensors[name] = fake_of(old)  # type: ignore[assignment]
        yield


def fake_of(old: Tensor) -> Tensor:
    """A tensor like `old`, fake and on the CPU."""
    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cpu")
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def perceptual_network(net: str) -> Perceptual | None:
    """LPIPS on the meta device, with weights that mean nothing; None where torchmetrics is not installed."""
    try:
        from torchmetrics.functional.image.lpips import _NoTrainLpips
    except ImportError:
        return None
    network = Perceptual.__new__(Perceptual)
    with torch.device("meta"):
        network.net = _NoTrainLpips(pretrained=False, net=net, pnet_rand=True)  # type: ignore[arg-type]
    network.net.requires_grad_(False)
    return network


# Turns --------------------------------------------------------------------------------------------


def prior_turn(model: Prior, count: int, bf16: bool) -> Turn:
    """The turn of a prior on `count` images, as `train_prior` has it."""

    def parts(ledger: Ledger) -> Parts:
        tokens = torch.zeros(count, *model.grid.shape, dtype=torch.long)
        inputs = model.training_inputs(tokens, 0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(tokens, torch.zeros(count, dtype=torch.long), **inputs)
        logits = logits.float()  # as accelerate does
        yield "activations", ledger.now - logits.untyped_storage().nbytes()
        yield "logits", logits.untyped_storage().nbytes()
        loss = model.loss(logits, tokens, **inputs)
        del logits
        loss.backward()

    return take(parts, list(model.parameters()))


@dataclass(frozen=True)
class Recipe:
    """What `train_tokenizer` trains, and with what."""

    tokenizer: Tokenizer
    weights: dict[str, float]
    adversary: Adversary | None = None
    perceptual: Perceptual | None = None
    perceptual_weight: float = 0.0
    modules: list[nn.Module] = field(default_factory=list)


def tokenizer_turn(recipe: Recipe, count: int, bf16: bool) -> Turn:
    """The turn of a tokenizer on `count` images, its critic being heard."""
    model, adversary = recipe.tokenizer, recipe.adversary

    def parts(ledger: Ledger) -> Parts:
        images, kept = torch.zeros(count, *model.image_shape), 0

        def grown() -> int:
            nonlocal kept
            before, kept = kept, ledger.now
            return kept - before

        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(images)
        loss, _ = total_loss(output, images, recipe.weights)
        yield "activations", grown()
        if recipe.perceptual is not None:
            loss = loss + recipe.perceptual_weight * recipe.perceptual(output.images, images)
            yield "perceptual network", grown()
        if adversary is not None:
            adversary.critic.requires_grad_(False)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss + adversary.tokenizer_term(output.images, loss, model.last_layer, LATE)[0]
            yield "critic", grown()
        loss.backward()

    return take(parts, [p for module in recipe.modules for p in module.parameters()])


def critic_turn(recipe: Recipe, count: int, bf16: bool) -> Turn:
    """The turn of the critic on `count` images and as many reconstructions."""
    adversary = recipe.adversary
    assert adversary is not None
    adversary.critic.requires_grad_(True)

    def parts(ledger: Ledger) -> Parts:
        images = torch.zeros(count, *recipe.tokenizer.image_shape)
        reconstructions = torch.zeros_like(images)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = adversary.critic_term(adversary.critic, images, reconstructions)
        yield "activations", ledger.now
        loss.backward()

    return take(parts, list(adversary.critic.parameters()))


def take(parts: Callable[[Ledger], Parts], weights: list[nn.Parameter]) -> Turn:
    """Run a turn, and read the ledger. Gradients are there from the start, as with several micro-batches."""
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    known = {address(t) for weight in weights for t in (weight, weight.grad) if t is not None}
    ledger = Ledger(known)
    with CUDAKernels(), ledger:
        kept = dict(parts(ledger))
    return Turn(kept, ledger.peak - sum(kept.values()), ledger.peak_with_casts - ledger.peak)


def evaluation_of(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes at the worst moment of an evaluation, `run`, beside the weights of `model`: without autocast, as the
    averaged weights are not prepared by accelerate."""
    ledger = Ledger({address(tensor) for tensor in (*model.parameters(), *model.buffers())})
    model.eval()
    with torch.no_grad(), CUDAKernels(), ledger:
        run()
    model.train()
    return ledger.peak


def flops_of(turn: Callable[[], Any]) -> int:
    """FLOPs of all matrix products and convolutions in a turn, attention as two full ones however it is masked."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        counter = stack.enter_context(FlopCounterMode(display=False))
        turn()
    return int(counter.get_total_flops())


def checkpointed(blocks: list[nn.Module]) -> None:
    """Let each of `blocks` keep its input alone, and run again in the backward pass."""
    for block in blocks:
        # The backward pass does not know of a function mode around it.
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), CUDAKernels()),
        )
