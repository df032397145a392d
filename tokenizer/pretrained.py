"""A model with a name, saved to a folder and loaded from a folder: `config.json` (with the name) and
`model.safetensors`; loading is strict."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from .family import OUTSIDE, Named
from .files.errors import ConfigError, PathError, shown
from .files.hub import resolve_folder
from .files.ownership import Kind
from .files.pushing import CARD, model_card, push_model
from .files.reading import CODE, Folder, steadily
from .files.variants import Dtype, chosen_dtype, find_weights, rounded, stored_dtype, weights_name, weights_names
from .files.weights import check_header, expected_weights, fill, read_header, save_tensors
from .files.writing import atomic_folder, write_json
from .settings import ModelConfig
from .settings import Node as Node
from .settings.marks import Before as Before
from .settings.marks import Fact as Fact
from .settings.marks import Was as Was

CONFIG = "config.json"
PROVENANCE = "provenance.json"  # beside a tokenizer, written by the verb that trained or imported it
SUBFOLDER = r"(?!\.\.?(/|$))[^/\\]+(/(?!\.\.?(/|$))[^/\\]+)*"  # no part of it is . or ..
MAX_WEIGHT_BYTES = 16 << 30
MAX_ENTRIES = 10_000

M = TypeVar("M", bound="PretrainedModel")


class PretrainedModel(Named, nn.Module):
    """A named model that can be saved to a folder and loaded from a folder or a Hub repository."""

    stored_names: ClassVar[dict[str, str]] = {}
    """Modules that are called otherwise in files (and in `state_dict`) than here: their name there for that here."""
    stored_dtype: torch.dtype | None = None
    """The type of the weights in the file that it was loaded from, if it was: `dtype="auto"`."""

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

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the parameters have, those that several modules share counted once. only_trainable: without
        those that `requires_grad_(False)` has frozen."""
        return sum(each.numel() for each in self.parameters() if each.requires_grad or not only_trainable)

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

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write `config.json` and `model.safetensors`; replaces a folder of a model of this family as a whole.

        variant: "fp16" or "bf16" rounds the weights to that type, and writes `model.fp16.safetensors` instead. Raises
        `PathError` if `folder` holds anything else, and names it; `ValueError` for weights that the type cannot hold.
        """
        if variant is not None:
            return rounded(self, variant).write(folder, weights_name(variant))
        self.write(folder, weights_name(None))

    def write(self, folder: str | Path, name: str) -> None:
        """`save_pretrained` of the weights as they are, in a file of this name."""
        with atomic_folder(folder, kind=self.folder_kind()) as target:
            write_json(target / CONFIG, self.config.to_dict())
            weights = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
            # Readers of other libraries require "format". Only one key: safetensors writes several in random order.
            save_tensors(weights, target / name, {"format": "pt"})

    @classmethod
    def folder_kind(cls) -> Kind:
        """How a folder of a model of this family is recognised."""

        def says(config: dict[str, Any]) -> bool:
            return config.get("kind") in cls.available()

        return Kind(f"a {cls._package}", CONFIG, says, (CONFIG, PROVENANCE, *weights_names()).__contains__)

    @classmethod
    def from_pretrained(
        cls: type[M],
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | Path | None = None,
        variant: str | None = None,
        dtype: Dtype = None,
        torch_dtype: Dtype = None,
        device: str | torch.device | None = None,
    ) -> M:
        """Load a model of this family (or of this class; or of the class that this is a subclass of, as this) from a
        folder or Hub id, in eval mode.

        dtype (or torch_dtype): of the weights in memory; None is float32, "auto" what the file holds. variant: "fp16"
        or "bf16", where the weights are such (see `save_pretrained`); None takes what is there. force_download: fetch
        again what is in the cache.

        Raises a `PipelineLoadError`: `PathError` (no such folder or file), `ConfigError` (unknown kind or key, bad
        value), `WeightsError` (missing, extra, misshapen or non-finite weight), `FormatError`, `LimitError`.
        """
        subfolder = "" if subfolder is None else str(subfolder).rstrip("/")
        if subfolder and not re.fullmatch(SUBFOLDER, subfolder):
            raise PathError(f"subfolder: {shown(subfolder)} names no folder inside {shown(str(source))}")
        patterns = [f"{subfolder}/{name}" if subfolder else name for name in (CONFIG, *weights_names(variant))]
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = resolve_folder(source, patterns, force_download=force_download, **options) / subfolder
        warn_of_code(folder)
        model = steadily(folder, lambda: cls.read_from(Folder.at(folder), variant=variant))
        return model.to(device=device, dtype=chosen_dtype(dtype, torch_dtype, model.stored_dtype))

    @classmethod
    def read_from(cls: type[M], files: Folder, *, max_bytes: int = MAX_WEIGHT_BYTES, variant: str | None = None) -> M:
        """Like `from_pretrained`, for an open folder; the weights may have at most `max_bytes`."""
        place, data = files.place(CONFIG), files.json(CONFIG)
        kind = data.pop("kind", None)
        try:
            if not isinstance(kind, str) or kind not in cls.available():
                known = ", ".join(cls.available())
                raise ConfigError(f"kind: no {cls._package} is called {shown(kind)}; there are {known}; {OUTSIDE}")
            member: Any = cls.find(kind)
            if issubclass(cls, member) and cls.name == kind:  # a subclass of the user's, without a name of its own
                member = cls
            if not issubclass(member, cls):
                raise ConfigError(f"kind: holds a {kind!r}, not a {cls.name!r}")
            config = member.Config.from_saved(data)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        expected = expected_weights(lambda: member(config), place)
        with files.open(find_weights(files, variant), max_bytes) as file:
            entries = read_header(file.read, file.size, file.path)
            check_header(entries, expected, file.path)
            model: M = member(config)
            fill(model, file, entries)
        model.stored_dtype = stored_dtype(entries, expected)
        return model.eval()

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
        """Create the Hub repository if needed and upload the model's folder and a card in one commit (create_pr: in a
        pull request). Files of an earlier model are removed, all others stay. variant: as in `save_pretrained`.

        Returns huggingface_hub's `CommitInfo`. Raises `PushError`, an `OSError`, with the reason in one line.
        """
        return push_model(
            lambda folder: self.save_pretrained(folder, variant=variant),
            model_card(self._package, self.name, self.num_parameters()),
            repo_id,
            [CONFIG, CARD, PROVENANCE, *weights_names()],
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )


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


def some_entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, up to 10,000 entries; nothing where there is none, or where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return list(itertools.islice(entries, MAX_ENTRIES))
    except OSError:  # whoever reads it says so
        return []


def warn_of_code(*folders: Path) -> None:
    """Warn, in one line, of files that can hold code; they are never opened. The first folder contains the others."""
    names = [
        os.path.relpath(entry.path, folders[0])
        for folder in folders
        for entry in some_entries(folder)
        if entry.name.lower().endswith(CODE)
    ]
    if names:
        more = f" and {len(names) - 1} more" * (len(names) > 1)
        warnings.warn(
            f"{folders[0]}: files that may hold code are never opened: {shown(min(names))}{more}", stacklevel=3
        )
