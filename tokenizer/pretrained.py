"""A model with a name: found in its family, saved to a folder, loaded from it.

A family (`Tokenizer`, `Quantizer`, `Prior`) finds its members by importing the modules of its own package, so a new
model is one new file. A folder holds `config.json` (with the name) and `model.safetensors`; loading is strict.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import pkgutil
import re
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from .settings import ModelConfig, node_problems, problems_in, setting
from .storage import (
    ConfigError,
    FormatError,
    IntegrityError,
    LimitError,
    PathError,
    PipelineLoadError,
    WeightsError,
    atomic_folder,
    read_bytes,
    read_json,
    write_json,
)

__all__ = [
    "ConfigError", "FormatError", "IntegrityError", "LimitError", "ModelConfig", "Named", "PathError",
    "PipelineLoadError", "PretrainedModel", "WeightsError", "node_problems", "parse_weights", "problems_in",
    "resolve_folder", "setting",
]  # fmt: skip

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_WEIGHT_BYTES = 16 << 30
MAX_PARAMETERS = 4_000_000_000
MAX_HEADER_BYTES = 1 << 20

N = TypeVar("N", bound="Named")
M = TypeVar("M", bound="PretrainedModel")


class Named:
    """`class Tokenizer(Named, family="tokenizer")` opens a family whose members live in that package's modules;
    `class VQVAE(Tokenizer, name="vqvae")` joins it, with a `Config` class of its own."""

    Config: ClassVar[type[ModelConfig]]
    name: ClassVar[str] = ""
    _members: ClassVar[dict[str, type]]
    _package: ClassVar[str]

    def __init_subclass__(cls, *, name: str | None = None, family: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family:
            cls._members, cls._package = {}, family
        if name:
            cls.name = cls.Config.kind = name
            cls._members[name] = cls

    @classmethod
    def available(cls) -> list[str]:
        """The names of the family, sorted."""
        package = importlib.import_module(cls._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{cls._package}.{module.name}")
        return sorted(cls._members)

    @classmethod
    def find(cls: type[N], name: str) -> type[N]:
        """The member called `name`; raises `ConfigError` listing what there is."""
        names = cls.available()
        if name not in names:
            raise ConfigError(f"no {cls.__name__} is called {name!r}; there are {', '.join(names)}")
        return cls._members[name]

    @classmethod
    def create(cls: type[N], name: str, **config: Any) -> N:
        """Build the member called `name` from keyword configuration; raises `ConfigError`."""
        member: Any = cls.find(name)
        return member(member.Config.from_dict(config))


class PretrainedModel(Named, nn.Module):
    """A named model that can be saved to a folder and loaded from a folder or a Hub repository."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.config: Any = config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((t.device for t in itertools.chain(self.parameters(), self.buffers())), torch.device("cpu"))

    def fingerprint(self) -> str:
        """sha256 over configuration and weights: two models with the same fingerprint are the same function.

        Settings added later do not change it while they have their default. Floats are read as float32, so
        that weights saved in bfloat16 have the fingerprint of what is loaded from them.
        """
        digest = hashlib.sha256(json.dumps(self.config.identity(), sort_keys=True).encode())
        for key, value in sorted(self.state_dict().items()):
            value = value.float() if value.is_floating_point() else value
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; an existing model folder is replaced as a whole.

        Raises `PathError` if `folder` holds something else.
        """
        with atomic_folder(folder, marker=CONFIG) as target:
            write_json(target / CONFIG, self.config.to_dict())
            weights = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
            save_file(weights, target / WEIGHTS, metadata={"format_version": "1"})

    @classmethod
    def from_pretrained(
        cls: type[M],
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> M:
        """Load a model of this family (or exactly this class) from a folder or Hub id, in eval mode.

        Raises a `PipelineLoadError`: `PathError` (no such folder or file), `ConfigError` (unknown kind or key, bad
        value), `WeightsError` (missing, extra, misshapen or non-finite weight), `FormatError`, `LimitError`.
        """
        patterns = [f"{subfolder}/{name}" if subfolder else name for name in (CONFIG, WEIGHTS)]
        folder = resolve_folder(source, patterns, revision=revision, token=token, cache_dir=cache_dir,
                                local_files_only=local_files_only) / subfolder  # fmt: skip
        data = read_json(folder / CONFIG)
        kind = data.pop("kind", None)
        try:
            if not isinstance(kind, str) or kind not in cls.available():
                found, names = repr(kind)[:80], ", ".join(cls.available())
                raise ConfigError(f"kind: no {cls._package} is called {found}; there are {names}")
            member: Any = cls.find(kind)
            if not issubclass(member, cls):
                raise ConfigError(f"kind: holds a {kind!r}, not a {cls.name!r}")
            config = member.Config.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{folder / CONFIG}: {error}") from error
        weights = _read_weights(folder / WEIGHTS, member, config)
        model = member(config)
        model.load_state_dict(weights, strict=True)
        return model.to(device=device, dtype=dtype).eval()


def parse_weights(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors in `data`, which is what stands in the safetensors file `path`. Raises `LimitError` for a header that
    is too large, `WeightsError` for one that can not be read."""
    if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
        raise LimitError(f"{path}: not safetensors, or its header is larger than {MAX_HEADER_BYTES} bytes")
    try:
        return parse_safetensors(data)
    except (SafetensorError, KeyError, ValueError, OverflowError, TypeError, RuntimeError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error


def _read_weights(path: Path, member: type[PretrainedModel], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of `path`, checked against what `config` asks for before that much memory is allocated."""
    try:
        with torch.device("meta"):
            expected = member(config).state_dict()
    except (ValueError, OverflowError, RuntimeError) as error:  # sizes that are each allowed, but not together
        raise ConfigError(f"{path.parent / CONFIG}: {error}") from error
    if sum(value.numel() for value in expected.values()) > MAX_PARAMETERS:
        raise LimitError(f"{path.parent / CONFIG}: asks for more than {MAX_PARAMETERS} parameters")
    found = parse_weights(read_bytes(path, MAX_WEIGHT_BYTES), path)
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise WeightsError(f"{path}: missing weights {missing[:5]}, unexpected weights {extra[:5]}")
    for key, value in expected.items():
        if found[key].shape != value.shape:
            raise WeightsError(f"{path}: {key} has shape {list(found[key].shape)}, expected {list(value.shape)}")
        if found[key].is_floating_point() != value.is_floating_point():
            raise WeightsError(f"{path}: {key} has type {found[key].dtype}, expected {value.dtype}")
        if found[key].is_floating_point() and not bool(torch.isfinite(found[key].float()).all()):
            raise WeightsError(f"{path}: {key} holds a value that is not finite")
    return found


def resolve_folder(source: str | Path, patterns: list[str], *, revision: str | None, token: str | None,
                   cache_dir: str | Path | None, local_files_only: bool) -> Path:  # fmt: skip
    """`source` as a local folder, fetched from the Hub when it is a repository id. Raises `PathError`."""
    if os.path.isdir(source):  # unlike Path.is_dir, also False for a name that no folder can have
        return Path(source)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", str(source)):
        raise PathError(f"{str(source)[:200]!r} is neither an existing folder nor a Hub id of the form 'owner/name'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), revision=revision, token=token, cache_dir=cache_dir,
                                      local_files_only=local_files_only, allow_patterns=patterns))  # fmt: skip
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PathError(
            f"{str(source)!r} is not an existing folder, and as a Hub id it could not be fetched: {reason}"
        ) from error
