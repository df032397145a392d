"""A pretended GPU: tensors say `cuda:0` and compute on the CPU, and what a GPU would refuse is an error.

So are tensors of two devices in one operation, a generator of another device, `.numpy()` of a GPU's tensor, and
attention of two types. Real values flow, so whole runs go through it, under torch's own rules of CUDA's autocast. It
says nothing of kernels, speed or memory.

How: a tensor subclass that wraps a CPU's, a dispatch mode that wraps what is made on `cuda`, and 30 lines of C++, as
autograd asks for the device's guard. Torch is changed for good, so it takes a process of its own, and comes before the
project is imported:

    python tests/support/pretended_gpu.py [--float32] [WORD]    # --float32: a GPU without float64, as Apple's

tries the models, the abilities and the runs whose title contains WORD, a line for each.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.optim.optimizer as optimizer
import torch.utils._foreach_utils as foreach
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kCUDA; }
  Device exchangeDevice(Device) const override { return Device(kCUDA, 0); }
  Device getDevice() const override { return Device(kCUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, Device(kCUDA, 0)); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
struct Hooks final : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
extern "C" void pretend() {
  impl::registerDeviceGuard(kCUDA, new Guard());
  static Hooks hooks;  // torch holds hooks of its own already: ours take their methods' place
  *(void**)&at::detail::getCUDAHooks() = *(void**)&hooks;
}
"""
COPIES = {"copy_", "_to_copy", "copy", "_foreach_copy_", "set_", "_copy_from"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_unique2", "unique_dim"}
"""What the host waits for."""
NUMBERS = re.compile(  # what takes a number that is a CPU's tensor of no axes
    "add|sub|rsub|mul|div|floor_divide|pow|remainder|fmod|eq|ne|lt|le|gt|ge|maximum|minimum|where|masked_fill|fill|"
    "logical_(and|or|xor)|bitwise_(and|or|xor)|atan2|copysign|xlogy|logaddexp"
)


class NoCompiler(RuntimeError):
    """There is nothing here to compile the guard with."""


class DeviceMix(RuntimeError):
    """What a GPU would refuse."""


class Pretended(Tensor):
    """A tensor that says it is on the GPU."""

    elem: Tensor
    float32 = False  # whether the GPU has no float64

    @staticmethod
    def __new__(cls, elem: Tensor) -> Pretended:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=CUDA,
        )
        out.elem = elem
        return out

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Wraps what is made on the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


waits: Counter[str] = Counter()
"""How often the host would have waited for the GPU, by operation."""


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: judged as a GPU would, done on the CPU."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    judge(func, args, ours, [tensor for tensor in tensors if not isinstance(tensor, Pretended)])
    target = kwargs.get("device")
    on_gpu = bool(ours) if target is None else torch.device(target).type == "cuda"
    generator = kwargs.get("generator")
    if generator is not None and (Generator.places.get(generator._cdata, CPU).type == "cuda") != on_gpu:
        raise DeviceMix(f"{func}: a generator of another device than the tensor's")
    count_waits(func, args, kwargs, ours, on_gpu)
    plain = tree_map(unwrapped, kwargs)
    if on_gpu and target is not None:
        plain["device"] = CPU
    if plain.get("pin_memory"):
        plain["pin_memory"] = False
    out = func(*tree_map(unwrapped, args), **plain)
    if not on_gpu:
        return out
    if Pretended.float32 and any(one.dtype == torch.float64 for one in tree_leaves(out) if isinstance(one, Tensor)):
        raise DeviceMix("the GPU has no float64")
    out = tree_map_only(Tensor, Pretended, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours else out


def count_waits(func: Any, args: Any, kwargs: dict[str, Any], ours: list[Tensor], on_gpu: bool) -> None:
    """Note a number that is read, a result whose size depends on values, or a copy that blocks."""
    name = func._schema.name.partition("::")[2]
    if name in INDEXED:
        waits[name] += bool(ours) and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
    elif name in ("_to_copy", "copy_"):
        source, target = (args[0], on_gpu) if name == "_to_copy" else (args[1], isinstance(args[0], Pretended))
        free = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        waits[name] += isinstance(source, Pretended) != target and not free
    else:
        waits[name] += bool(ours) and name in READS


def unwrapped(value: Any) -> Any:
    return value.elem if isinstance(value, Pretended) else value


def judge(func: Any, args: Any, ours: list[Tensor], others: list[Tensor]) -> None:
    """Raise `DeviceMix` for an operation on tensors of both devices that no GPU does."""
    name = func._schema.name.partition("::")[2]
    if not (ours and others) or name in COPIES:
        return
    if name in INDEXED:
        values = args[2] if name not in ("index", "_unsafe_index") else None
        mixed = not isinstance(args[0], Pretended) or (
            isinstance(values, Tensor) and not isinstance(values, Pretended) and values.dim() > 0
        )
    else:
        mixed = any(tensor.dim() or not NUMBERS.fullmatch(name.rstrip("_")) for tensor in others)
    if mixed:
        shapes = [[list(tensor.shape) for tensor in some] for some in (ours, others)]
        raise DeviceMix(f"{func}: tensors of two devices: {shapes[0]} on the GPU, {shapes[1]} on the CPU")


class Generator(torch.Generator):
    """A generator that says where it is."""

    places: dict[int, torch.device] = {}  # the dispatcher makes an object of its own for the same generator

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        Generator.places[made._cdata] = torch.device(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return Generator.places[self._cdata]

    def manual_seed(self, seed: int) -> Generator:
        super().manual_seed(seed)
        return self


real_attention = F.scaled_dot_product_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **more: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention`, which asks a real GPU which kernel to take."""
    given = [q, k, v]
    if not any(isinstance(one, Pretended) for one in given):
        return real_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **more)
    if torch.is_autocast_enabled("cuda"):
        given = [one.to(torch.get_autocast_dtype("cuda")) for one in given]
    if len({one.dtype for one in given}) > 1:
        raise DeviceMix(f"attention of {[one.dtype for one in given]}")
    with torch.autocast("cuda", enabled=False):
        q, k, v = given
        scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        return scores.softmax(-1) @ v


def compiled() -> Path:
    """The guard as a library, compiled once. Raises `NoCompiler`."""
    compiler = shutil.which("g++") or shutil.which("c++")
    key = hashlib.sha256((GUARD + torch.__version__).encode()).hexdigest()[:16]
    library, torch_at = Path(tempfile.gettempdir()) / f"pretended_gpu_{key}.so", Path(torch.__file__).parent
    if library.exists():
        return library
    if compiler is None:
        raise NoCompiler("no C++ compiler")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        source, made = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        flags = ["-shared", "-fPIC", "-std=c++20", "-O0", "-w", f"-I{torch_at}/include", f"-L{torch_at}/lib"]
        done = subprocess.run(
            [compiler, *flags, str(source), "-o", str(made), "-lc10", "-ltorch_cpu"], capture_output=True, text=True
        )
        if done.returncode:
            raise NoCompiler(done.stderr[-500:])
        os.replace(made, library)
    return library


def pretend() -> None:
    """Let torch, in this process, believe in a GPU. Raises `NoCompiler`."""
    ctypes.CDLL(str(compiled())).pretend()
    torch._C._set_multithreading_enabled(False)  # autograd has no thread for this device
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device="cuda") is a copy, which the mode sees
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the objects that they are
    torch.inference_mode = lambda mode=True: torch.no_grad()  # in which wrappers have no views
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    for name in ("manual_seed", "manual_seed_all", "set_device", "empty_cache", "synchronize"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Generator = Generator
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor.clone()
    torch.cuda.Event = lambda **_: SimpleNamespace(record=lambda *_: None, synchronize=lambda: None)
    F.scaled_dot_product_attention = attention
    optimizer._foreach_supported_types.append(Pretended)
    foreach._foreach_supported_types = optimizer._foreach_supported_types
    several = lambda tensors, device: True  # noqa: E731
    foreach._has_foreach_support = torch.nn.utils.clip_grad._has_foreach_support = several


# What is tried


def refused() -> None:
    """The pretending itself: mixes of devices raise, and what is right does not."""
    x, here = torch.randn(3, device=CUDA), torch.randn(3)
    mixes: list[Callable[[], Any]] = [
        lambda: x + here,
        lambda: torch.cat([x, here]),
        lambda: here[x.long()],
        lambda: torch.where(x > 0, x, here),
        lambda: torch.rand(3, device=CUDA, generator=torch.Generator()),
        lambda: torch.rand(3, generator=torch.Generator("cuda")),
        lambda: torch.nn.Linear(3, 2)(x),
        *([lambda: x.double()] if Pretended.float32 else []),
    ]
    for number, mix in enumerate(mixes):
        with contextlib.suppress(DeviceMix):
            mix()
            raise AssertionError(f"mix {number} was let through")
    layer = torch.nn.Linear(3, 2).to(CUDA)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and isinstance(layer.weight.grad, Pretended)
    assert torch.equal((x + 1).cpu(), x.cpu() + 1)
    before = waits.total()
    x.sum().item(), x[x > 0], x.to(CPU), x.cpu()
    assert waits.total() == before + 4 and not (x.to(CPU, non_blocking=True), waits.total() - before - 4)[1]


def check_gradients(model: torch.nn.Module, loss: Tensor) -> None:
    """Every parameter has one: several GPUs would wait for it."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained:
        model.zero_grad()
        loss.backward()
        assert not [name for name, parameter in trained.items() if parameter.grad is None]


def try_tokenizer(name: str, config: dict[str, Any]) -> None:
    """Training steps in bf16, tokens and images."""
    from small import make_tokenizer

    from tokenizer.losses import total_loss

    model = make_tokenizer(name, (16, 16), **config)
    if hasattr(model, "vae"):  # which should be a trained one
        model.start_from(model.vae)
    model.initialize(torch.rand(32, 3, 16, 16) * 2 - 1)
    model = model.to(CUDA).train()
    for _ in range(3):
        batch = torch.rand(8, 3, 16, 16, device=CUDA) * 2 - 1
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = model(batch)
        check_gradients(model, total_loss(output, batch, {"l1": 1.0, "l2": 1.0, **model.loss_weights})[0])
    with torch.no_grad():
        tokens = model.eval().encode(batch)
        assert tokens.device == model.decode(tokens).device == CUDA


def try_prior(name: str, config: dict[str, Any]) -> None:
    """A training step in bf16, a likelihood, and all ways of sampling."""
    from small import draw_tokens, generators, make_prior

    model = make_prior(name, (4, 4), 7, **config).train()
    tokens, labels = draw_tokens(model, 8), torch.arange(8) % 4
    model.initialize(tokens, labels % 3)
    model, tokens, labels = model.to(CUDA), tokens.to(CUDA), labels.to(CUDA)
    inputs = model.training_inputs(tokens, 0.3)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        outputs = model.forward_outputs(tokens, labels, **inputs)
    check_gradients(model, model.loss_from_outputs(outputs, tokens, **inputs))
    with torch.no_grad():
        model.eval().log_prob(tokens, labels)
    known = torch.rand(model.grid.shape) < 0.5
    guided = {"guidance_scale": 2.0, "top_k": 5, "top_p": 0.9, "temperature": 0.8}
    for way in ({}, {"known": known, "tokens": tokens[:4]}, {"cache": False}, {"parallel": True}, guided):
        drawn = model.sample(4, labels[:4] % 3, generator=generators(4), **way)
        assert drawn.device == CUDA and drawn.shape == (4, *model.grid.shape)


def try_pipeline() -> None:
    """What users call."""
    from small_pipelines import make_pipeline, pixels_for

    pipe = make_pipeline(sizes={"likelihood": {"kind": "discretized_logistic"}}).to(CUDA)
    images = pixels_for(pipe, 40)
    pipe(4, labels="cat", seed=3, guidance_scale=2.0)
    pipe.complete(images[:2], torch.arange(8)[:, None].expand(8, 12) < 4, draws=2)
    pipe.decode(pipe.encode(images[:4])), pipe.embed(images[:4])
    pipe.log_prob(images[:4]), pipe.bits_per_dim(images[:4])
    pipe.calibrate(images), pipe.anomaly_score(images[:4], p_values=True), pipe.anomaly_map(images[:4])


def try_run(train: Callable[[Path], Path]) -> None:
    """A whole run in bf16, whose steps never wait for the GPU between logged ones."""
    from accelerate.state import AcceleratorState

    from pipelines.training.trainer import Trainer

    os.environ.update(ACCELERATE_TORCH_DEVICE="cuda:0", ACCELERATE_MIXED_PRECISION="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    before: dict[int, int] = {}
    take_step = Trainer.take_step

    def watched(trainer: Trainer, *rest: Any) -> None:
        assert trainer.device == CUDA
        before[trainer.step] = waits.total()
        take_step(trainer, *rest)

    with tempfile.TemporaryDirectory() as folder, patch.object(Trainer, "take_step", watched):
        train(Path(folder, "run"))
    assert before[8] == before[3], f"{before[8] - before[3]} waits in five steps: {+waits}"


def checks() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Titles, and what to do."""
    from launch import make_tokens, train_prior, train_tokenizer
    from small import ANY_ORDER, PRIORS, QUANTIZERS, TOKENIZERS, VARIANTS, node_of

    from tokenizer.likelihoods import Likelihood

    yield "what a GPU refuses", refused
    for name in TOKENIZERS:
        yield f"tokenizer {name}", partial(try_tokenizer, name, {})
    for name in QUANTIZERS:
        nodes = {"multiscale": {"kind": "multiscale", "scales": [1, 2, 4]}}
        yield f"quantizer {name}", partial(try_tokenizer, "vqvae", {"quantizer": nodes.get(name, node_of(name))})
    for name in Likelihood.available():
        yield f"likelihood {name}", partial(try_tokenizer, "vqvae", {"likelihood": {"kind": name}})
    for name, config in [*((name, {}) for name in [*PRIORS, *VARIANTS]), *ANY_ORDER.items()]:
        yield f"prior {name} {' '.join(config)}".strip(), partial(try_prior, name, config)
    yield "pipeline", try_pipeline
    quiet = {"train__log_every": 1000}
    critic = {"critic": {"weight": 0.5, "width": 8, "layers": 1, "warmup": 1, "ramp": 1, "adaptive": True}}
    yield "run of a tokenizer", partial(try_run, partial(train_tokenizer, **quiet))
    yield "run of a tokenizer with a critic", partial(try_run, partial(train_tokenizer, **quiet, **critic))
    yield (
        "run of a prior",
        partial(
            try_run,
            lambda out: train_prior(out, make_tokens(out.with_name("tokens")), train__optimizer="muon", **quiet),
        ),
    )


def try_all(only: str) -> int:
    """Try all whose title contains `only`, a line for each; how many failed."""
    from prior import sampling
    from tokenizer import precision

    sampling.can_capture = lambda device: False
    if Pretended.float32:
        precision.WITHOUT_FLOAT64.add("cuda")
    tried = failed = 0
    for title, check in checks():
        if only not in title:
            continue
        tried, problem = tried + 1, ""
        try:
            torch.manual_seed(0)
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), Pretending():
                check()
        except (Exception, SystemExit):
            failed, problem = failed + 1, traceback.format_exc(limit=-3)
        print(f"{'FAIL' if problem else 'ok'}  {title}\n{problem}".rstrip(), flush=True)
    print(f"{tried} tried, {failed} failed")
    return failed or not tried


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        pretend()
    except NoCompiler as reason:
        print(reason)
        sys.exit(3)
    words = [word for word in sys.argv[1:] if word != "--float32"]
    Pretended.float32 = words != sys.argv[1:]
    sys.exit(bool(try_all(" ".join(words))))
