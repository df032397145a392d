"""A model with a name: found in its family, saved to a folder, loaded from a folder.

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
import warnings
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from .files.errors import ConfigError, PathError, shown
from .files.hub import resolve_folder
from .files.ownership import Kind
from .files.reading import CODE, Folder, steadily
from .files.weights import check_header, expected_weights, fill, read_header
from .files.writing import atomic_folder, write_json
from .settings import Choices, ModelConfig, choices_of
from .settings import Node as Node
from .settings.marks import Before as Before
from .settings.marks import Fact as Fact
from .settings.marks import Was as Was

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PROVENANCE = "provenance.json"  # beside a tokenizer, written by the verb that trained or imported it
SUBFOLDER = r"(?!\.\.?(/|$))[^/\\]+(/(?!\.\.?(/|$))[^/\\]+)*"  # no part of it is . or ..
MAX_WEIGHT_BYTES = 16 << 30
MAX_ENTRIES = 10_000

N = TypeVar("N", bound="Named")
M = TypeVar("M", bound="PretrainedModel")


class Named:
    """`class Tokenizer(Named, family="tokenizer")` opens a family whose members live in that package's modules, and in
    what the faces of its folders import; `class VQVAE(Tokenizer, name="vqvae")` joins it, with a `Config` class of its
    own."""

    Config: ClassVar[type[ModelConfig]]
    name: ClassVar[str] = ""
    _members: ClassVar[dict[str, type]]
    _package: ClassVar[str]
    _searched: ClassVar[set[str]] = set()

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
        if cls._package not in Named._searched:
            package = importlib.import_module(cls._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{cls._package}.{module.name}")
            Named._searched.add(cls._package)
        return sorted(cls._members)

    @classmethod
    def find(cls: type[N], name: str) -> type[N]:
        """The member called `name`. Raises `ConfigError` that lists the members."""
        names = cls.available()
        if name not in names:
            raise ConfigError(f"no {cls.__name__} is called {shown(name)}; there are {', '.join(names)}")
        return cls._members[name]

    @classmethod
    def choices(cls) -> type[Choices]:
        """The settings of this member that a preset may hold."""
        return choices_of(cls.Config, cls.__doc__)

    @classmethod
    def create(cls: type[N], name: str, **config: Any) -> N:
        """Build the member called `name`; keyword arguments are its configuration. Raises `ConfigError`."""
        member: Any = cls.find(name)
        return member(member.Config(**config))


class PretrainedModel(Named, nn.Module):
    """A named model that can be saved to a folder and loaded from a folder or a Hub repository."""

    stored_names: ClassVar[dict[str, str]] = {}
    """Modules that are called otherwise in files (and in `state_dict`) than here: their name there for that here."""

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.config: Any = config
        if self.stored_names:
            self.register_state_dict_post_hook(_rename_for_files)
            self.register_load_state_dict_pre_hook(_rename_from_files)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next((t.device for t in itertools.chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, without those of a quantizer, which stay float32; float32 if there are none."""
        weights = (p for name, p in self.named_parameters() if "quantizer" not in name.split("."))
        return next((p.dtype for p in weights), torch.float32)

    def fingerprint(self) -> str:
        """sha256 of configuration and weights: two models with the same fingerprint are the same function.

        A setting that was added later does not change it while it has its default. Floats are hashed as float32, so
        that weights saved in bfloat16 have the same fingerprint as the model loaded from them.
        """
        digest = hashlib.sha256(json.dumps(self.config.identity(), sort_keys=True).encode())
        for key, value in sorted(self.state_dict().items()):
            value = value.float() if value.is_floating_point() else value
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; replaces a folder of a model of this family as a whole.

        Raises `PathError` if `folder` holds anything else, and names it.
        """
        with atomic_folder(folder, kind=self.folder_kind()) as target:
            write_json(target / CONFIG, self.config.to_dict())
            weights = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
            # Readers of other libraries require "format". Only one key: safetensors writes several in random order.
            save_file(weights, target / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def folder_kind(cls) -> Kind:
        """How a folder of a model of this family is recognised."""

        def says(config: dict[str, Any]) -> bool:
            return config.get("kind") in cls.available()

        return Kind(f"a {cls._package}", CONFIG, says, (CONFIG, WEIGHTS, PROVENANCE).__contains__)

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
        subfolder = subfolder.rstrip("/")
        if subfolder and not re.fullmatch(SUBFOLDER, subfolder):
            raise PathError(f"subfolder: {shown(subfolder)} names no folder inside {shown(str(source))}")
        patterns = [f"{subfolder}/{name}" if subfolder else name for name in (CONFIG, WEIGHTS)]
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = resolve_folder(source, patterns, **options) / subfolder
        warn_of_code(folder)
        return steadily(folder, lambda: cls.read_from(Folder.at(folder))).to(device=device, dtype=dtype)

    @classmethod
    def read_from(cls: type[M], files: Folder, *, max_bytes: int = MAX_WEIGHT_BYTES) -> M:
        """Like `from_pretrained`, for an open folder; the weights may have at most `max_bytes`."""
        place, data = files.place(CONFIG), files.json(CONFIG)
        kind = data.pop("kind", None)
        try:
            if not isinstance(kind, str) or kind not in cls.available():
                raise ConfigError(
                    f"kind: no {cls._package} is called {shown(kind)}; there are {', '.join(cls.available())}"
                )
            member: Any = cls.find(kind)
            if not issubclass(member, cls):
                raise ConfigError(f"kind: holds a {kind!r}, not a {cls.name!r}")
            config = member.Config.from_saved(data)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        expected = expected_weights(lambda: member(config), place)
        with files.open(WEIGHTS, max_bytes) as file:
            entries = read_header(file.read, file.size, file.path)
            check_header(entries, expected, file.path)
            model: M = member(config)
            fill(model, file, entries)
        return model.eval()


def _rename_for_files(model: Any, weights: dict[str, Any], prefix: str, _: Any) -> None:
    _rename(weights, prefix, model.stored_names)


def _rename_from_files(model: Any, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(weights, prefix, {stored: name for name, stored in model.stored_names.items()})


def _rename(weights: dict[str, Any], prefix: str, names: dict[str, str]) -> None:
    """Rename in place, in their order, those of `weights` that lie below one of `names` of the model at `prefix`."""
    for key in list(weights):
        name, dot, rest = key.removeprefix(prefix).partition(".")
        renamed = f"{prefix}{names.get(name, name)}{dot}{rest}" if key.startswith(prefix) else key
        weights[renamed] = weights.pop(key)


def warn_of_code(*folders: Path) -> None:
    """Warn, in one line, of files that can hold code; they are never opened. The first folder contains the others."""
    names = [
        os.path.relpath(entry.path, folders[0])
        for folder in folders
        if folder.is_dir()
        for entry in itertools.islice(os.scandir(folder), MAX_ENTRIES)
        if entry.name.lower().endswith(CODE)
    ]
    if names:
        more = f" and {len(names) - 1} more" * (len(names) > 1)
        warnings.warn(
            f"{folders[0]}: files that may hold code are never opened: {shown(min(names))}{more}", stacklevel=3
        )
