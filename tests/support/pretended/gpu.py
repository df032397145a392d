"""A pretended GPU: tensors say `cuda:0` and compute on the CPU, and what a GPU would refuse is an error.

So are tensors of two devices in one operation, a generator of another device, `.numpy()` of a GPU's tensor, and
attention of two types. Real values flow, so whole runs go through it, under torch's own rules of CUDA's autocast. It
says nothing of kernels, speed or memory.

How: a tensor subclass that wraps a CPU's, a dispatch mode that wraps what is made on `cuda`, and 30 lines of C++, as
autograd asks for the device's guard. Torch is changed for good, so it takes a process of its own, and comes before the
project is imported.

With PYTHONPATH=.:tests/support

    python -m pretended.gpu [WORD]              # tries what `gpu_components` says (of that name), a line for each
    python -m pretended.gpu waits               # how often the host waits for the GPU in a training step, and where
    python -m pretended.gpu --float32 [WORD]    # the same on a GPU that has no float64, as Apple's
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch.optim.optimizer as optimizer
import torch.utils._foreach_utils as foreach
from pretended import gpu_counts
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
    gpu_counts.note(func, args, kwargs, on_gpu, is_ours)
    plain = tree_map(unwrapped, kwargs)
    if on_gpu and target is not None:
        plain["device"] = CPU
    if plain.get("pin_memory"):
        plain["pin_memory"] = False
    out = func(*tree_map(unwrapped, args), **plain)
    if not on_gpu:
        return gpu_counts.send(out) if ours and kwargs.get("non_blocking") else out
    require_known(out)
    out = tree_map_only(Tensor, Pretended, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours else out


def is_ours(value: Any) -> bool:
    return isinstance(value, Pretended)


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


def require_known(made: Any) -> None:
    """Raise `DeviceMix` for what is made on the GPU in a type that it has not."""
    if Pretended.float32 and any(one.dtype == torch.float64 for one in tree_leaves(made) if isinstance(one, Tensor)):
        raise DeviceMix("the GPU has no float64")


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
    torch.Tensor.pin_memory = gpu_counts.pin
    torch.cuda.Event = gpu_counts.Event
    F.scaled_dot_product_attention = attention
    optimizer._foreach_supported_types.append(Pretended)
    foreach._foreach_supported_types = optimizer._foreach_supported_types
    several = lambda tensors, device: True  # noqa: E731
    foreach._has_foreach_support = torch.nn.utils.clip_grad._has_foreach_support = several


def run(only: str) -> bool:
    """Try all components whose name contains `only`, a line for each; whether all went well."""
    from pretended.emulated_graphs import Emulated
    from pretended.gpu_components import components

    from prior import cuda_graph, sampling
    from tokenizer import precision

    cuda_graph.capture = Emulated().capture
    if Pretended.float32:
        precision.WITHOUT_FLOAT64.add("cuda")
        sampling.can_capture = lambda device: False  # only CUDA has graphs, and it has float64
    failed, tried = 0, 0
    for name, component in components():
        if only not in name:
            continue
        told, tried, problem, found = io.StringIO(), tried + 1, "", None
        try:
            torch.manual_seed(0)
            with redirect_stdout(told), redirect_stderr(told), Pretending(), warnings.catch_warnings():
                warnings.filterwarnings("error", message="not captured in a CUDA graph")
                found = component()
        except (Exception, SystemExit) as error:
            failed += 1
            said = told.getvalue() if isinstance(error, SystemExit) else str(error)
            problem = f"{place_of(error)}: {type(error).__name__}: {said.strip()[-300:]}"
        more = found if isinstance(found, str) else " ".join(problem.split())
        print(f"{'FAIL' if problem else 'ok  '}  {name:<60} {more}".rstrip(), flush=True)
    print(f"{tried} components, {failed} failed")
    return not failed and bool(tried)


def place_of(error: BaseException) -> str:
    """The innermost line of the project."""
    tests, lines = Path(__file__).parents[2], traceback.extract_tb(error.__traceback__)
    ours = [(Path(line.filename), line.lineno) for line in lines if Path(line.filename).is_relative_to(tests.parent)]
    ours = [place for place in ours if "site-packages" not in place[0].parts]
    own = [place for place in ours if not place[0].is_relative_to(tests)] or ours
    return f"{own[-1][0].relative_to(tests.parent)}:{own[-1][1]}" if own else "outside"


if __name__ == "__main__":
    sys.modules["pretended.gpu"] = sys.modules["__main__"]  # one class of tensors, not two
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        pretend()
    except NoCompiler as reason:
        print(reason)
        sys.exit(2)
    words = [word for word in sys.argv[1:] if word != "--float32"]
    Pretended.float32 = words != sys.argv[1:]
    sys.exit(0 if run(" ".join(words)) else 1)
