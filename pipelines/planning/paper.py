"""Models on paper: tensors with shapes but no storage, and a ledger of the storages that they would take.

A model is built on the meta device and run as a fake one on the CPU (`torch._subclasses.FakeTensorMode`). The ledger
counts the storages that live, so that nothing is assumed about a model. Where CUDA would use another kernel than the
CPU, `CUDAKernels` uses it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

T = TypeVar("T")

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
UNKNOWN: dict[str, Callable[..., Any]] = {
    "bincount": lambda ids, minlength=0: ids.new_zeros(minlength),
    "nonzero": lambda mask: mask.new_zeros(0, mask.ndim, dtype=torch.long),
    "__int__": lambda number: 1,
}
"""What depends on the data, which a fake tensor does not have: the counts of ids; which codes are dead (none); and a
whole number, which is a seed, or how many steps a codebook has taken (one, so that it is past its first)."""


# Models without storage ---------------------------------------------------------------------------


def on_meta(build: Callable[[], T]) -> T:
    """What `build` makes, without storage."""
    with torch.device("meta"):
        return build()


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


# The ledger ---------------------------------------------------------------------------------------


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live: `casts` are copies of `weights` in another type,
    `now` is all else. `peak` is the largest `now`, `peak_with_casts` the largest sum of both. `launches` counts the
    operations that a GPU would be told of: all but views."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights, self.known = weights, set(weights)
        self.now = self.peak = self.casts = self.peak_with_casts = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.launches += not func.is_view
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


# Kernels of CUDA ----------------------------------------------------------------------------------


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
        if name in UNKNOWN and isinstance(args[0], FakeTensor):
            return UNKNOWN[name](*args, **kwargs)
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
