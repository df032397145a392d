"""Named models: create them by name, save them to a folder, load them from a folder or the Hub.

    class VQVAE(Tokenizer, name="vqvae"):   # in tokenizer/vqvae.py
        Config = VQVAEConfig

    Tokenizer.create("vqvae", widths=(32, 64))
    Tokenizer.from_pretrained("runs/vqvae_digits/tokenizer")

A model's folder holds `model.safetensors` and `config.json`: its settings, with its name as `kind`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import os
import pkgutil
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import Choices, ModelConfig, choices_of
from .files import (
    ConfigError,
    FolderKind,
    PathError,
    PipelineLoadError,
    WeightsError,
    atomic_folder,
    check_name,
    find_folder,
    push_folder,
    quote,
    read_folder,
    read_json,
    reading,
    stat_file,
    write_json,
)

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PROVENANCE, SPLITS = "provenance.json", "splits.json"  # next to a tokenizer, written by the verb that trained it
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
Dtype = torch.dtype | Literal["auto"] | None  # of the weights in memory: None is float32, "auto" that of the file

R = TypeVar("R", bound="Registered")
M = TypeVar("M", bound="PretrainedModel")
N = TypeVar("N", bound=nn.Module)


# The registry -------------------------------------------------------------------------------------


class Registered:
    """A family of classes that can be looked up by name.

    `class Tokenizer(Registered, family="tokenizer")` defines a family; `class VQVAE(Tokenizer, name="vqvae")`, in the
    module `tokenizer.vqvae` of the same name, joins it and defines a `Config` class. `family` may list several
    packages, separated by spaces.
    """

    Config: ClassVar[type[ModelConfig]]
    name: ClassVar[str] = ""
    families: ClassVar[dict[str, type[Registered]]] = {}  # by their first package or module
    _members: ClassVar[dict[str, type]]
    _packages: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, *, name: str | None = None, family: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family:
            cls._members, cls._packages = {}, tuple(family.split())
            Registered.families[cls._packages[0]] = cls
        if name:
            cls._register(name)

    @classmethod
    def _register(cls, name: str) -> None:
        if not NAME.fullmatch(name):
            raise ConfigError(f"{quote(name)} is not a valid name: use lower case letters, digits and _")
        if not f"{cls.__module__}.".startswith(tuple(f"{package}." for package in cls._packages)):
            cls._import_module_of(name)  # built-in models take precedence
        other = cls._members.get(name)
        if other is not None and other.__module__ != cls.__module__:
            raise ConfigError(f"a class in {other.__module__} is already named {quote(name)}; choose another name")
        if not hasattr(cls, "Config"):
            raise ConfigError(f"{cls.__name__} has no settings; define them in a class `Config`")
        if "Config" not in vars(cls) or vars(cls.Config).get("kind", name) != name:  # inherited or shared
            make: Any = type(cls.Config)
            namespace = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Config"}  # as pickle needs
            cls.Config = make(f"{cls.__name__}Config", (cls.Config,), namespace)
        cls.name = cls.Config.kind = name
        cls._members[name] = cls

    @classmethod
    def _import_module_of(cls, name: str) -> None:
        for package in cls._packages:
            if name in cls._members:
                return
            is_folder = hasattr(importlib.import_module(package), "__path__")  # a family may also be a single module
            if is_folder and importlib.util.find_spec(f"{package}.{name}"):
                importlib.import_module(f"{package}.{name}")

    @classmethod
    def available(cls) -> list[str]:
        """Import the family's packages and return the sorted names of all members."""
        for package in cls._packages:
            folder = getattr(importlib.import_module(package), "__path__", [])
            for module in pkgutil.iter_modules(folder, f"{package}."):
                importlib.import_module(module.name)
        return sorted(cls._members)

    @classmethod
    def has(cls, name: object) -> bool:
        """Return whether the family has a member of this (untrusted) name; import its module, or else all modules."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            return False
        if name not in cls._members:
            cls._import_module_of(name)
        return name in cls._members or name in cls.available()

    @classmethod
    def find(cls: type[R], name: str) -> type[R]:
        """Return the member `name`. Raises a `ConfigError` that lists the members."""
        if not cls.has(name):
            raise ConfigError(cls.describe_unknown(name))
        return cls._members[name]

    @classmethod
    def describe_unknown(cls, name: object) -> str:
        return (
            f"no {cls.__name__} is called {quote(name)}; available: {', '.join(cls.available())}; your own models "
            "must be imported first, for example with --import FILE"
        )

    @classmethod
    def choices(cls) -> type[Choices]:
        return choices_of(cls.Config, cls.__doc__)

    @classmethod
    def create(cls: type[R], name: str, **config: Any) -> R:
        """Build the member `name` with the given configuration. Raises `ConfigError`."""
        member: Any = cls.find(name)
        made: R = member(member.Config(**config))
        return made


# Models -------------------------------------------------------------------------------------------


class PretrainedModel(Registered, nn.Module):
    """A named model that can be saved to a folder and loaded from a folder or a Hub repository."""

    stored_dtype: torch.dtype | None = None  # of the weights in the file from which the model was loaded

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.config: Any = config

    @property
    def device(self) -> torch.device:
        return next((t.device for t in itertools.chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights outside quantizers, which stay float32; float32 for a model without weights."""
        weights = (p for name, p in self.named_parameters() if "quantizer" not in name.split("."))
        return next((p.dtype for p in weights), torch.float32)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Count parameters, shared ones once. only_trainable: exclude frozen ones."""
        return sum(each.numel() for each in self.parameters() if each.requires_grad or not only_trainable)

    def fingerprint(self) -> str:
        """Return the sha256 of configuration and weights; models with equal fingerprints compute the same function.

        Floats are hashed as float32, so loading bfloat16 weights in another type does not change the fingerprint.
        """
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for key, value in sorted(self.state_dict().items()):
            value = value.float() if value.is_floating_point() else value
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @classmethod
    def folder_kind(cls) -> FolderKind:
        files = (CONFIG, PROVENANCE, SPLITS, *weights_names())
        return FolderKind(f"a {cls._packages[0]}", CONFIG, lambda data: cls.has(data.get("kind")), files.__contains__)

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write `config.json` and `model.safetensors` atomically, replacing an earlier model of this family.

        variant: "fp16" or "bf16" rounds the weights to that type and writes, for example, `model.fp16.safetensors`.
        Raises a `PathError` that names foreign files in `folder`, `WeightsError` for non-finite weights, and
        `ValueError` for weights that overflow the type.
        """
        model = self if variant is None else round_weights(self, variant)
        with atomic_folder(folder, kind=self.folder_kind()) as target:
            write_json(target / CONFIG, self.config.to_dict())
            save_weights(model.state_dict(), target / weights_name(variant))

    @classmethod
    def from_pretrained(
        cls: type[M],
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        subfolder: str | Path | None = None,
        variant: str | None = None,
        dtype: Dtype = None,
        device: str | torch.device | None = None,
    ) -> M:
        """Load a model of this class or family from a folder or Hub id, in eval mode.

        dtype: type of the weights in memory; None means float32, "auto" the type in the file. variant: "fp16" or "bf16"
        selects weights saved that way (see `save_pretrained`); None prefers full precision and accepts any. An unnamed
        subclass loads models that its parent saved.

        Raises a `PipelineLoadError`: `PathError` (no such folder or file), `ConfigError` (unknown kind or key, bad
        value), `WeightsError` (missing, extra, misshapen or non-finite weight), `FormatError`, `LimitError`.
        """
        inner = "" if subfolder is None else str(subfolder).rstrip("/")
        if inner:
            check_name(inner, "subfolder")
        names = [CONFIG, *weights_names(variant)]
        folder = find_folder(
            source,
            [f"{inner}/{name}" if inner else name for name in names],
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        model = cls.load_folder(folder / inner, variant=variant)
        return model.to(device=device, dtype=choose_dtype(dtype, model.stored_dtype))

    @classmethod
    def load_folder(cls: type[M], folder: Path, *, variant: str | None = None) -> M:
        return read_folder(folder, lambda: cls._read_folder(folder, variant))

    @classmethod
    def _read_folder(cls: type[M], folder: Path, variant: str | None) -> M:
        path = folder / CONFIG
        data = read_json(path)
        try:
            member = cls._find_saved(data.pop("kind", None))
            config = member.Config(**data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        expected = build_on_meta(lambda: member(config), path).state_dict()
        with open_weights(find_weights_file(folder, variant)) as file:
            file.require(expected)  # before allocating the model
            with NoInitialisation():
                model: M = member(config)
            model.stored_dtype = file.copy_into(model)
        return model.eval()

    @classmethod
    def _find_saved(cls, kind: Any) -> Any:
        if kind is None:
            raise ConfigError("kind: missing, so this is not a Smalti model; use `smalti import` for published weights")
        if not cls.has(kind):
            raise ConfigError(f"kind: {cls.describe_unknown(kind)}")
        member: Any = cls.find(kind)
        if issubclass(cls, member) and cls.name == kind:  # a user's unnamed subclass
            return cls
        if not issubclass(member, cls):
            raise ConfigError(f"kind: found a {kind!r}, expected a {cls.name!r}")
        return member

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        commit_message: str = "Upload model",
    ) -> Any:
        """Upload the model and a card in one commit, replacing an earlier model; create the repository if needed.
        variant: see `save_pretrained`. Returns huggingface_hub's `CommitInfo`. Raises `PushError`, also for a
        repository that holds a pipeline."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, variant=variant)
            family, count = self._packages[0], self.num_parameters()
            card = MODEL_CARD.format(family=family, Family=family.title(), name=self.name, parameters=count)
            (folder / CARD).write_text(card, encoding="utf-8")
            place = {"token": token, "private": private, "revision": revision, "create_pr": create_pr}
            return push_folder(folder, repo_id, **place, commit_message=commit_message)  # type: ignore[arg-type]


MODEL_CARD = """---
library_name: smalti
tags:
- image-generation
- {family}
- {name}
---

# {name}, a {family}

{parameters:,} parameters, for Smalti.

```python
from {family} import {Family}
model = {Family}.from_pretrained("this folder or Hub id")
```
"""


# Weights ------------------------------------------------------------------------------------------


def weights_name(variant: str | None) -> str:
    if variant is None:
        return WEIGHTS
    if variant not in VARIANTS:
        raise ValueError(f"variant must be {' or '.join(VARIANTS)}, or None (got {variant!r})")
    return WEIGHTS.replace(".", f".{variant}.")


def weights_names(variant: str | None = None) -> list[str]:
    return [weights_name(None), *map(weights_name, VARIANTS)] if variant is None else [weights_name(variant)]


def find_weights_file(folder: Path, variant: str | None) -> Path:
    """Return the file of this variant; None prefers full precision. Raises a `PathError` that lists what exists."""
    wanted = weights_names(variant)
    there = [name for name in weights_names() if (folder / name).exists()]
    if not set(wanted) & set(there):
        raise PathError(f"{folder / wanted[0]}: no such file" + (f"; found {', '.join(there)}" if there else ""))
    return folder / next(name for name in wanted if name in there)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises `WeightsError` for non-finite values, and `OSError`, also for a full disk."""
    for key, value in weights.items():
        if value.is_floating_point() and not bool(value.detach().isfinite().all()):
            raise WeightsError(f"{key} holds a value that is not finite, so it could not be loaded again")
    try:
        tensors, seen = dict[str, Tensor](), set[int]()
        for key, value in weights.items():
            tensor = value.detach().cpu().contiguous()
            memory = tensor.untyped_storage().data_ptr()
            tensors[key] = tensor.clone() if memory in seen else tensor  # safetensors rejects tied weights
            seen.add(memory)
        save_file(tensors, path, {"format": "pt"})  # other libraries require this key
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def round_weights(model: N, variant: str) -> N:
    """Copy `model` and round its weights, except a quantizer's, to `variant`. Raises `ValueError` if some overflow."""
    weights_name(variant)
    smaller = copy.deepcopy(model).to(dtype=VARIANTS[variant])
    for name, value in smaller.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"variant {variant!r}: {name} holds values outside the range of this type")
    return smaller


def choose_dtype(dtype: Dtype, stored: torch.dtype | None) -> torch.dtype | None:
    """Resolve "auto"; None keeps the weights unchanged. Raises `TypeError` for an invalid value."""
    if dtype == "auto":
        return stored
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype should be a torch.dtype, 'auto' or None (got {dtype!r})")
    return dtype


class NoInitialisation(TorchFunctionMode):
    """Turn the functions of `torch.nn.init` into no-ops, for weights that will be overwritten."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build_on_meta(build: Callable[[], N], path: Path) -> N:
    """Build a model without allocating memory. path: its configuration file. Raises `ConfigError`."""
    try:
        with torch.device("meta"), NoInitialisation():
            return build()
    except PipelineLoadError as error:
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:  # a model may raise anything for invalid settings
        if "meta" in str(error):
            raise ConfigError(
                f"{path}: the model's constructor reads tensor values; create those tensors with device='cpu' ({error})"
            ) from error
        raise ConfigError(f"{path}: cannot build a model with this configuration ({error})") from error


class WeightsFile:
    """An open safetensors file, read one tensor at a time."""

    def __init__(self, file: Any, path: Path) -> None:
        self.file, self.path = file, path
        self.names: list[str] = sorted(file.keys())

    def require(self, expected: Mapping[str, Tensor]) -> None:
        """Raise `WeightsError` unless the file has exactly these names and shapes. Reads only the header."""
        missing, extra = sorted(set(expected) - set(self.names)), sorted(set(self.names) - set(expected))
        if missing or extra:
            raise WeightsError(
                f"{self.path}: missing weights {quote(missing[:5])}, unexpected weights {quote(extra[:5])}"
            )
        for name, value in expected.items():
            if (shape := list(self.file.get_slice(name).get_shape())) != list(value.shape):
                raise WeightsError(f"{self.path}: {name} has shape {shape}, expected {list(value.shape)}")

    @torch.no_grad()
    def copy_into(self, model: nn.Module) -> torch.dtype:
        """Copy the weights into `model`; return their type in the file (float32 if only a quantizer has weights).
        Raises `WeightsError` for non-finite values and integers in place of floats, or vice versa."""
        stored = []
        for name, target in model.state_dict().items():
            value = self.file.get_tensor(name)
            if value.dtype != target.dtype and not (value.is_floating_point() and target.is_floating_point()):
                raise WeightsError(f"{self.path}: {name} has type {value.dtype}, expected {target.dtype}")
            target.copy_(value)
            if value.is_floating_point():
                if target.numel() and not all(map(math.isfinite, torch.stack(target.aminmax()).tolist())):
                    raise WeightsError(f"{self.path}: {name} holds a value that is not finite")
                stored += [] if "quantizer" in name.split(".") else [value.dtype]
        return stored[0] if stored else torch.float32


@contextmanager
def open_weights(path: Path) -> Iterator[WeightsFile]:
    """Open a safetensors file. Raises `WeightsError` if it is damaged, `PathError` or `UnreadableError`."""
    stat_file(path)
    try:
        with reading(path), safe_open(path, framework="pt") as file:
            yield WeightsFile(file, path)
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error
