"""A fake GPU: tensors report `cuda:0` and are computed on the CPU, and what a GPU would refuse is an error.

Errors are: tensors of two devices in one operation, a generator of another device, `.numpy()` of a GPU tensor, and
attention on mixed types. Values are real, so whole runs work, under torch's rules for CUDA autocast. Kernels, speed and
memory are not modelled.

A tensor subclass wraps a CPU tensor, a dispatch mode wraps tensors created on `cuda`, and 30 lines of C++ provide the
device guard that autograd asks for. Torch is changed permanently, so this runs in a process of its own:

    python tests/support/fake_gpu.py [--float32] [WORD ...]    # --float32: a GPU without float64, such as Apple's

runs the checks whose title contains a WORD, or all, and prints a line for each.
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
extern "C" void install() {
  impl::registerDeviceGuard(kCUDA, new Guard());
  static Hooks hooks;  // torch already holds its own hooks object: replace its method table
  *(void**)&at::detail::getCUDAHooks() = *(void**)&hooks;
}
"""
COPIES = {"copy_", "_to_copy", "copy", "_foreach_copy_", "set_", "_copy_from"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_unique2", "unique_dim"}
"""Operations for which the host waits."""
TAKES_SCALARS = re.compile(  # operations on GPU tensors that accept a zero-dimensional CPU tensor
    "add|sub|rsub|mul|div|floor_divide|pow|remainder|fmod|eq|ne|lt|le|gt|ge|maximum|minimum|where|masked_fill|fill|"
    "logical_(and|or|xor)|bitwise_(and|or|xor)|atan2|copysign|xlogy|logaddexp"
)
syncs: Counter[str] = Counter()
"""Number of times the host would have waited for the GPU, by operation."""


class NoCompiler(RuntimeError):
    """The device guard cannot be compiled here."""


class DeviceError(RuntimeError):
    """An operation that a GPU would refuse."""


class GPUTensor(Tensor):
    """A tensor that reports to be on the GPU."""

    elem: Tensor
    float32 = False  # whether the GPU has no float64

    @staticmethod
    def __new__(cls, elem: Tensor) -> GPUTensor:
        layout = {"strides": elem.stride(), "storage_offset": elem.storage_offset(), "layout": elem.layout}
        out = torch.Tensor._make_wrapper_subclass(cls, elem.size(), **layout, dtype=elem.dtype, device=CUDA)
        out.elem = elem
        return out

    def __repr__(self, **_: Any) -> str:
        return f"GPUTensor({tuple(self.shape)}, {self.dtype})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class OnGPU(TorchDispatchMode):
    """Wraps tensors that are created on the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check an operation as a GPU would, and compute it on the CPU."""
    name = func._schema.name.partition("::")[2]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, GPUTensor)]
    check_devices(name, args, ours, [tensor for tensor in tensors if not isinstance(tensor, GPUTensor)])
    target, generator = kwargs.get("device"), kwargs.get("generator")
    on_gpu = bool(ours) if target is None else torch.device(target).type == "cuda"
    if generator is not None and (Generator.places.get(generator._cdata, CPU).type == "cuda") != on_gpu:
        raise DeviceError(f"{func}: generator and tensor are on different devices")
    count_syncs(name, args, kwargs, ours, on_gpu)
    plain = tree_map(unwrap, kwargs)
    if on_gpu and target is not None:
        plain["device"] = CPU
    if plain.get("pin_memory"):
        plain["pin_memory"] = False
    out = func(*tree_map(unwrap, args), **plain)
    if not on_gpu:
        return out
    if GPUTensor.float32 and any(leaf.dtype == torch.float64 for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
        raise DeviceError("the GPU has no float64")
    out = tree_map_only(Tensor, GPUTensor, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours else out


def unwrap(value: Any) -> Any:
    return value.elem if isinstance(value, GPUTensor) else value


def check_devices(name: str, args: Any, ours: list[Tensor], others: list[Tensor]) -> None:
    """Raise `DeviceError` if a GPU would refuse the mix of devices."""
    if not (ours and others) or name in COPIES:
        return
    if name in INDEXED:
        values = args[2] if name not in ("index", "_unsafe_index") else None
        scalar = not isinstance(values, Tensor) or isinstance(values, GPUTensor) or values.dim() == 0
        mixed = not isinstance(args[0], GPUTensor) or not scalar
    else:
        mixed = any(tensor.dim() or not TAKES_SCALARS.fullmatch(name.rstrip("_")) for tensor in others)
    if mixed:
        shapes = [[list(tensor.shape) for tensor in some] for some in (ours, others)]
        raise DeviceError(f"{name}: tensors on two devices: {shapes[0]} on the GPU, {shapes[1]} on the CPU")


def count_syncs(name: str, args: Any, kwargs: dict[str, Any], ours: list[Tensor], on_gpu: bool) -> None:
    """Count reads of values, results whose size depends on values, and blocking copies."""
    if name in INDEXED:
        syncs[name] += bool(ours) and any(isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1])
    elif name in ("_to_copy", "copy_"):
        source, target = (args[0], on_gpu) if name == "_to_copy" else (args[1], isinstance(args[0], GPUTensor))
        asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        syncs[name] += isinstance(source, GPUTensor) != target and not asynchronous
    else:
        syncs[name] += bool(ours) and name in SYNCS


class Generator(torch.Generator):
    """A generator that reports the device it was created for."""

    places: dict[int, torch.device] = {}  # by C++ object: the dispatcher creates new Python objects for it

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


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *rest: Any, **more: Any) -> Tensor:
    """`F.scaled_dot_product_attention`, which would query a real GPU to choose a kernel. No dropout."""
    if not isinstance(q, GPUTensor):
        return real_attention(q, k, v, attn_mask, *rest, **more)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (each.to(torch.get_autocast_dtype("cuda")) for each in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise DeviceError(f"attention on {q.dtype}, {k.dtype}, {v.dtype}")
    with torch.autocast("cuda", enabled=False):
        scores = q @ k.transpose(-1, -2) * (more.get("scale") or q.shape[-1] ** -0.5)
        if more.get("is_causal"):
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        return scores.softmax(-1) @ v


def compile_guard() -> Path:
    """Compile the guard as a library, once for each version of torch. Raises `NoCompiler`."""
    key = hashlib.sha256((GUARD + torch.__version__).encode()).hexdigest()[:16]
    library, root = Path(tempfile.gettempdir()) / f"fake_gpu_{key}.so", Path(torch.__file__).parent
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None and not library.exists():
        raise NoCompiler("no C++ compiler")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / "guard.so"
            flags = ["-shared", "-fPIC", "-std=c++20", "-O0", "-w", f"-I{root}/include", f"-L{root}/lib"]
            command = [str(compiler), *flags, "-x", "c++", "-", "-o", str(built), "-lc10", "-ltorch_cpu"]
            done = subprocess.run(command, input=GUARD, capture_output=True, text=True)
            if done.returncode:
                raise NoCompiler(done.stderr[-500:])
            os.replace(built, library)
    return library


def install() -> None:
    """Make torch believe that this process has a GPU. Raises `NoCompiler`."""
    ctypes.CDLL(str(compile_guard())).install()
    torch._C._set_multithreading_enabled(False)  # autograd has no thread for this device
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device="cuda") becomes a copy that the mode sees
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters keep their identity
    torch.inference_mode = lambda mode=True: torch.no_grad()  # wrappers have no views in inference mode
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.mem_get_info = lambda *_: (80 << 30, 80 << 30)
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda *_: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    ignored = ("manual_seed", "manual_seed_all", "set_device", "empty_cache", "synchronize", "reset_peak_memory_stats")
    for name in ignored:
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Generator = Generator
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor.clone()
    torch.cuda.Event = lambda **_: SimpleNamespace(record=lambda *_: None, synchronize=lambda: None)
    F.scaled_dot_product_attention = attention
    optimizer._foreach_supported_types.append(GPUTensor)
    foreach._foreach_supported_types = optimizer._foreach_supported_types
    several = lambda tensors, device: True  # noqa: E731
    foreach._has_foreach_support = torch.nn.utils.clip_grad._has_foreach_support = several


# Checks


def check_fake() -> None:
    """The fake refuses mixed devices, and counts syncs."""
    x, here = torch.randn(3, device=CUDA), torch.randn(3)
    mixes: list[Callable[[], Any]] = [
        lambda: x + here,
        lambda: here[x.long()],
        lambda: torch.rand(3, device=CUDA, generator=torch.Generator()),
        *([lambda: x.double()] if GPUTensor.float32 else []),
    ]
    for number, mix in enumerate(mixes):
        with contextlib.suppress(DeviceError):
            mix()
            raise AssertionError(f"mix {number} was accepted")
    before = syncs.total()
    x.sum().item(), x[x > 0], x.to(CPU), x.cpu(), x.to(CPU, non_blocking=True)
    assert syncs.total() == before + 4


def check_gradients(model: torch.nn.Module, loss: Tensor) -> None:
    """Every trained parameter gets a gradient; DDP would wait for a missing one."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained:
        model.zero_grad()
        loss.backward()
        assert not [name for name, parameter in trained.items() if parameter.grad is None]


def check_tokenizer(name: str, config: dict[str, Any]) -> None:
    """Training steps in bf16, encoding and decoding."""
    from small import make_tokenizer

    from tokenizer.losses import total_loss

    model = make_tokenizer(name, (16, 16), **config)
    if hasattr(model, "vae"):  # normally a trained one
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


def check_prior(name: str, config: dict[str, Any]) -> None:
    """A training step in bf16, a likelihood, and all modes of sampling."""
    from small import draw_tokens, encode, generators, make_prior

    model = make_prior(name, (4, 4), 7, **config).train()
    tokens, labels = draw_tokens(model, 8), torch.arange(8) % 4
    model.initialize(tokens, model.read_given(labels % 3, None, 8))
    model, tokens, labels = model.to(CUDA), tokens.to(CUDA), labels.to(CUDA)
    inputs = model.training_inputs(tokens, 0.3)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        outputs = model.forward_outputs(tokens, encode(model, 8, labels), **inputs)
    check_gradients(model, model.loss_from_outputs(outputs, tokens, **inputs))
    with torch.no_grad():
        model.eval().log_prob(tokens, labels)
    known = torch.rand(model.grid.shape) < 0.5
    guided = {"guidance_scale": 2.0, "top_k": 5, "top_p": 0.9, "temperature": 0.8}
    for options in ({}, {"known": known, "tokens": tokens[:4]}, {"cache": False}, {"parallel": True}, guided):
        drawn = model.sample(4, labels[:4] % 3, generator=generators(4), **options)
        assert drawn.device == CUDA and drawn.shape == (4, *model.grid.shape)
    for condition in (None, model.read_given(None, None, 4).over("label")):  # images finish one after another
        model.sample(4, condition=condition, generator=generators(4), parallel=True)


def check_pipeline() -> None:
    """The public methods of a pipeline."""
    from small_pipelines import make_conditioned, make_pipeline, pixels_for

    from pipelines.inference.scales import calibrate_column

    pipe = make_pipeline(sizes={"likelihood": {"kind": "discretized_logistic"}}).to(CUDA)
    images = pixels_for(pipe, 40)
    pipe(4, labels="cat", seed=3, guidance_scale=2.0)
    pipe.complete(images[:2], torch.arange(8)[:, None].expand(8, 12) < 4, draws=2)
    pipe.decode(pipe.encode(images[:4])), pipe.embed(images[:4])
    pipe.decompress(pipe.compress(images[:4], condition={"label": None}), condition={"label": None})
    pipe.calibrate(images), pipe.anomaly_score(images[:4], p_values=True), pipe.anomaly_map(images[:4])
    pipe.log_prob(images[:4], marginal="label"), pipe.bits_per_dim(images[:4], marginal="label")
    pipe.calibrate(images, marginal="label"), pipe.anomaly_score(images[:4], marginal="label", p_values=True)
    calibrate_column(pipe, pipe.to_images(images), "label", torch.arange(40) % 3)
    pipe.infer(images[:4], "label", groups=["a", "a", "b", "c"]).table()
    pipe.evidence_map(images[:4], "label", "cat", "dog")
    make_conditioned(outline=False).to(CUDA).infer(images[:2], "age", condition={"view": "lateral"}).interval(0.9)
    place = {"place": {"kind": "vector", "size": 2, "encoder": "place"}}
    make_conditioned("masked", place, outline=False).to(CUDA).calibrate(images, stride=4)


def check_canvases() -> None:
    """Images larger than the model: drawn, scored, completed and healed."""
    from small import ANY_ORDER
    from small_pipelines import make_pipeline, pixels_for

    for kind, config in ANY_ORDER.items():
        pipe = make_pipeline("vqvae", kind, 3, size=(8, 8), sizes={"local": kind == "gpt"}, **config).to(CUDA)
        out = pipe(2, size=(16, 12), labels=[0, None], wrap=True, seed=0)
        pipe.canvas_log_prob(out.canvas, [0, None])
        pipe.complete(out.images, size=(24, 24), at=(4, 4), seed=1, guidance_scale=2.0, labels=1)
        pipe(labels=torch.zeros(1, 3, 2).long(), size=(16, 12), seed=0)
    pipe.calibrate(pixels_for(pipe, 40))
    pipe.heal(out.images, stride=4, draws=2)
    pipe.decode_canvas(pipe.encode_canvas(out.images))


def check_plan(*argv: str) -> None:
    """A plan builds a model on the GPU and measures its steps."""
    from pipelines.commands import plan

    assert plan.main([*argv, "out=x", "device=cuda", "train.steps=10"]).flops >= 0


def check_run(train: Callable[[Path], Path]) -> None:
    """A whole run in bf16, without a sync between logged steps."""
    from accelerate.state import AcceleratorState

    from pipelines.training.trainer import Trainer

    os.environ.update(ACCELERATE_TORCH_DEVICE="cuda:0", ACCELERATE_MIXED_PRECISION="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    before: dict[int, int] = {}
    take_step = Trainer.take_step

    def watched(trainer: Trainer, *rest: Any) -> None:
        assert trainer.device == CUDA
        before[trainer.step] = syncs.total()
        take_step(trainer, *rest)

    with tempfile.TemporaryDirectory() as folder, patch.object(Trainer, "take_step", watched):
        train(Path(folder, "run"))
    assert before[8] == before[3], f"{before[8] - before[3]} syncs in five steps: {+syncs}"


def checks() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Titles and functions."""
    from launch import arguments, make_tokens, train_prior, train_tokenizer
    from small import ANY_ORDER, PRIORS, QUANTIZERS, TOKENIZERS, VARIANTS, node_of

    from tokenizer.likelihoods import Likelihood

    yield "the fake itself", check_fake
    for name in TOKENIZERS:
        yield f"tokenizer {name}", partial(check_tokenizer, name, {})
    for name in QUANTIZERS:
        nodes = {"multiscale": {"kind": "multiscale", "scales": [1, 2, 4]}}
        yield f"quantizer {name}", partial(check_tokenizer, "vqvae", {"quantizer": nodes.get(name, node_of(name))})
    for name in Likelihood.available():
        yield f"likelihood {name}", partial(check_tokenizer, "vqvae", {"likelihood": {"kind": name}})
    for name, config in [*((name, {}) for name in [*PRIORS, *VARIANTS]), *ANY_ORDER.items()]:
        yield f"prior {name} {' '.join(config)}".strip(), partial(check_prior, name, config)
    yield "pipeline", check_pipeline
    yield "canvases", check_canvases
    quiet = {"train__log_every": 1000}
    critic = {"critic": {"weight": 0.5, "width": 8, "layers": 1, "warmup": 1, "ramp": 1, "adaptive": True}}
    grid = ["grid=[4,4]", "vocab_size=16", "classes=3"]
    for name in [name for name in PRIORS if name != "next_scale"]:  # whose scales are read from tokens
        yield f"plan of {name}", partial(check_plan, *arguments({"model": node_of(name)}), *grid)
    yield "plan with cca", partial(check_plan, *arguments({"model": node_of("gpt"), "objective": "cca"}), *grid)
    yield "plan of a tokenizer", partial(check_plan, *arguments({"model": node_of("vqgan"), **critic}))
    yield "run of a tokenizer", partial(check_run, partial(train_tokenizer, **quiet, **critic))

    def train_on_tokens(out: Path) -> Path:
        return train_prior(out, make_tokens(out.with_name("tokens")), train__optimizer="muon", **quiet)

    yield "run of a prior", partial(check_run, train_on_tokens)


def run_checks(words: list[str]) -> int:
    """Run the checks whose title contains one of `words`, and print a line for each; return the number of failures."""
    from prior import masks, sampling
    from tokenizer import precision

    sampling.can_capture = sampling.can_compile = masks.can_compile = lambda device: False
    if GPUTensor.float32:
        precision.WITHOUT_FLOAT64.add("cuda")
    count = failed = 0
    for title, check in checks():
        if words and not any(word in title for word in words):
            continue
        count, problem = count + 1, ""
        try:
            torch.manual_seed(0)
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), OnGPU():
                check()
        except (Exception, SystemExit):
            failed, problem = failed + 1, traceback.format_exc(limit=-3)
        print(f"{'FAIL' if problem else 'ok'}  {title}\n{problem}".rstrip(), flush=True)
    print(f"{count} checks, {failed} failed")
    return failed or not count


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        install()
    except NoCompiler as reason:
        print(reason)
        sys.exit(3)
    words = [word for word in sys.argv[1:] if word != "--float32"]
    GPUTensor.float32 = words != sys.argv[1:]
    sys.exit(bool(run_checks(words)))
