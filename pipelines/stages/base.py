"""Both stages in one folder: a tokenizer, the prior over its ids, and what is known of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL.Image import Image as PILImage
from torch import Tensor

from prior import Prior
from tokenizer import Tokenizer
from tokenizer.files.errors import ConfigError, IntegrityError, LimitError, PathError
from tokenizer.files.hub import resolve_folder
from tokenizer.files.json_text import parse_json
from tokenizer.files.reading import Folder, steadily
from tokenizer.files.writing import atomic_folder, write_json, write_manifest
from tokenizer.pretrained import MAX_WEIGHT_BYTES, PROVENANCE, warn_of_code

from ..images.pictures import as_batch, convert_images, save_picture, to_images, warn_if_unit
from .calibration import MAX_CALIBRATION_BYTES, Calibration
from .card import model_card
from .index import (
    BACKGROUND,
    CALIBRATION,
    CARD,
    FILES,
    FORMAT_VERSION,
    GRID,
    INDEX,
    MAX_GRID_PIXELS,
    MAX_PICTURE_BYTES,
    MAX_REST_BYTES,
    PARTS,
    PIPELINE,
    check_labels,
    check_listed,
    make_sampler,
    parse_picture,
    read_index,
    read_provenance,
)

Images = PILImage | Tensor | np.ndarray | Sequence[PILImage | Tensor | np.ndarray]
Label = int | str | None
S = TypeVar("S", bound="Stages")


class Stages:
    """A tokenizer and a prior that fit each other, saved and loaded as one folder; `ImagePipeline` says what for.

    labels: the names of the classes, in the order of their ids. sampler: defaults for the settings of sampling, those
    that the prior's `Sampling` declares. Raises `IntegrityError` when the prior was trained on another tokenizer,
    `ConfigError` for names or settings that do not go with the prior.
    """

    def __init__(
        self, tokenizer: Tokenizer, prior: Prior, *, labels: Sequence[str] = (), sampler: dict[str, Any] | None = None
    ) -> None:
        if tokenizer.grid != prior.grid:
            raise IntegrityError(f"prior/config.json: grid: {prior.grid} is not the tokenizer's, {tokenizer.grid}")
        if prior.config.tokenizer and prior.config.tokenizer != tokenizer.fingerprint():
            raise IntegrityError(
                "prior/config.json: tokenizer: the prior was trained on the tokens of another tokenizer "
                f"({prior.config.tokenizer[:12]}..., this one is {tokenizer.fingerprint()[:12]}...)"
            )
        if labels and len(labels) != prior.num_classes:
            raise ConfigError(f"{INDEX}: labels: {len(labels)} names for {prior.num_classes} classes")
        check_labels(labels)
        self.tokenizer, self.prior = tokenizer.eval(), prior.eval()
        self.labels = list(labels)
        self.sampler = make_sampler(type(prior), sampler or {})
        try:
            self.sampler.check(prior.grid)
        except ValueError as error:
            raise ConfigError(f"{INDEX}: sampler: {error}") from error
        self.provenance: dict[str, Any] = {}
        self.sample_grid: np.ndarray | None = None
        self.calibration: Calibration | None = None
        self.background: Prior | None = None
        self.interrupt = False

    def set_background(self, prior: Prior) -> None:
        """Keep a background prior beside the prior: one trained on perturbed tokens (`method="ratio"`). Raises
        `IntegrityError` for a prior over other tokens or classes."""
        ours, theirs = ((p.grid, p.num_classes, p.config.tokenizer) for p in (self.prior, prior))
        if ours != theirs:
            raise IntegrityError("background/config.json: not a prior over the same tokens and classes as prior/")
        self.background = prior.eval()

    def __repr__(self) -> str:
        grid, shape = self.prior.grid, "x".join(map(str, self.tokenizer.image_shape))
        return (
            f"{type(self).__name__}({self.tokenizer.name} + {self.prior.name}, images {shape}, tokens "
            f"{'x'.join(map(str, grid.shape))} of {grid.vocab_size}, {self.prior.num_classes} classes)"
        )

    # Between images and tokens

    @torch.no_grad()
    def encode(self, images: Any, *, batch_size: int = 256) -> Tensor:
        """Tokens `(B, *grid.shape)` of PIL images, or of uint8 or float in [-1, 1]: tensors `(B, C, H, W)`, arrays
        `(B, H, W, C)` or `(H, W, C)`, or a list of single ones.

        On a CPU image k has the same ids in any batch; `batch_size`: images at a time on other devices.
        """
        return self.encode_batch(self.to_images(images), batch_size=batch_size)

    @torch.no_grad()
    def encode_batch(self, batch: Tensor, *, batch_size: int = 256) -> Tensor:
        """`encode` of images as `to_images` returns them: float `(B, C, H, W)` in [-1, 1]."""
        parts = self._parts(batch.to(self.device, self.dtype), batch_size)
        return torch.cat([self.tokenizer.encode(part) for part in parts])

    @torch.no_grad()
    def decode(self, tokens: Tensor, *, output_type: str = "pil", batch_size: int = 256) -> Any:
        """Images of `tokens` `(B, *grid.shape)`, or of the first k, `(B, k)`, where these decode (`titok` with `keep`).
        Raises `ValueError` for ids out of range.

        On a CPU image k has the same pixels in any batch; `batch_size`: images at a time on other devices.
        """
        parts = self._parts(tokens.to(self.device), batch_size)
        return convert_images(torch.cat([self.tokenizer.decode(part) for part in parts]), output_type)

    def _parts(self, rows: Tensor, batch_size: int) -> list[Tensor]:
        """Images or tokens in the batches that the tokenizer takes: on a CPU one at a time, as the libraries behind
        torch choose kernels by the size of the batch, and kernels round differently: an 8-bit pixel could change."""
        if self.device.type != "cpu":
            return list(rows.split(batch_size))
        return [row.clone() for row in rows.split(1)]  # a clone is aligned in memory, so all images are alike

    def reconstruct(self, images: Any, *, output_type: str = "pil") -> Any:
        """`decode(encode(images))`: what the tokenizer keeps of them."""
        return self.decode(self.encode(images), output_type=output_type)

    # Saving and loading

    def save_pretrained(self, folder: str | Path, *, sample_grid: np.ndarray | None = None) -> None:
        """Write the pipeline folder, whole or not at all; an older pipeline there is replaced.

        sample_grid: uint8 (H, W, 3), shown on the model card. Raises `PathError` if `folder` holds something else,
        `LimitError` for a grid that could not be loaded again.
        """
        self.sample_grid = self.sample_grid if sample_grid is None else sample_grid
        if self.sample_grid is not None and self.sample_grid[..., 0].size > MAX_GRID_PIXELS:
            raise LimitError(f"sample_grid: {self.sample_grid.shape} is more than {MAX_GRID_PIXELS} pixels")
        fingerprint = self.tokenizer.fingerprint()
        for prior in filter(None, (self.prior, self.background)):
            if prior.config.tokenizer != fingerprint:  # another dtype has another fingerprint
                prior.config = prior.config.model_copy(update={"tokenizer": fingerprint})
        index = {
            "_class_name": "ImagePipeline",
            "format_version": FORMAT_VERSION,
            "tokenizer": self.tokenizer.name,
            "prior": self.prior.name,
            "labels": self.labels,
            "sampler": self.sampler.saved(),
            **({} if self.background is None else {"background": self.background.name}),
        }
        with atomic_folder(folder, kind=PIPELINE) as target:
            self.tokenizer.save_pretrained(target / "tokenizer")
            self.prior.save_pretrained(target / "prior")
            if self.background is not None:
                self.background.save_pretrained(target / BACKGROUND)
            if self.calibration is not None:
                (target / CALIBRATION).write_text(self.calibration.to_json(), encoding="utf-8")
            write_json(target / INDEX, index)
            if self.provenance:
                write_json(target / PROVENANCE, self.provenance)
            if self.sample_grid is not None:
                save_picture(self.sample_grid, target / GRID)
            has_grid = self.sample_grid is not None
            card = model_card(self.tokenizer, self.prior, self.labels, self.provenance, has_grid)
            (target / CARD).write_text(card, encoding="utf-8")
            write_manifest(target)

    @classmethod
    def from_pretrained(
        cls: type[S],
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        expected_sha256: str | None = None,
        max_bytes: int = MAX_WEIGHT_BYTES,
    ) -> S:
        """Load from a folder or a Hub id. Raises a `PipelineLoadError` naming file, field, what was found and what is
        allowed; every file is read once, and is the one of the manifest.

        expected_sha256: of `manifest.json`, hence of every file: nothing but this very pipeline is loaded. max_bytes:
        of the weights of each part.
        """
        folder = resolve_folder(
            source, FILES, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        warn_of_code(folder, *(folder / part for part in PARTS))
        pipeline = steadily(folder, lambda: cls._read(folder, expected_sha256, max_bytes))
        return pipeline.to(device=device, dtype=dtype)

    @classmethod
    def _read(cls: type[S], folder: Path, expected_sha256: str | None, max_bytes: int) -> S:
        if not (folder / INDEX).is_file():
            inner = folder / "pipeline"
            hint = f"; did you mean {inner}?" if (inner / INDEX).is_file() else ""
            raise PathError(f"{folder}: not a pipeline folder (no {INDEX}){hint}")
        files = Folder.sealed(folder, expected_sha256)
        index = read_index(files)
        tokenizer = Tokenizer.find(index["tokenizer"]).read_from(files.part("tokenizer"), max_bytes=max_bytes)
        prior = Prior.find(index["prior"]).read_from(files.part("prior"), max_bytes=max_bytes)
        pipeline = cls(tokenizer, prior, labels=index["labels"], sampler=index["sampler"])
        if "background" in index:
            family = Prior.find(index["background"])
            pipeline.set_background(family.read_from(files.part(BACKGROUND), max_bytes=max_bytes))
        if CALIBRATION in files:
            place, text = files.place(CALIBRATION), files.read(CALIBRATION, MAX_CALIBRATION_BYTES)
            pipeline.calibration = Calibration.from_dict(parse_json(text, place), place)
        if PROVENANCE in files:
            pipeline.provenance = read_provenance(files)
        if GRID in files:
            pipeline.sample_grid = parse_picture(files.read(GRID, MAX_PICTURE_BYTES), files.place(GRID))
        check_listed(files)
        files.read_rest(MAX_REST_BYTES)
        return pipeline

    def to(
        self: S, device: str | int | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> S:
        """Move all models to `device`, and change the type of their weights; returns itself. As for torch's modules a
        dtype may come first if it is alone: `to("cuda")`, `to(torch.bfloat16)`, `to("cuda", torch.bfloat16)`."""
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise TypeError(f"to() takes a device, a dtype, or a device and then a dtype (got {device}, {dtype})")
            device, dtype = None, device
        for model in filter(None, (self.tokenizer, self.prior, self.background)):
            model.to(device=device, dtype=dtype)
        return self

    # Conveniences

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.prior.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the tokenizer's weights."""
        return self.tokenizer.dtype

    def label_ids(self, labels: Label | Sequence[Label], count: int) -> Tensor | None:
        """Class ids `(count,)` of ids and names, or None. Raises `ValueError` naming what there is."""
        if labels is None:
            return None
        values = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels
        values = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values] * count
        if len(values) != count:
            raise ValueError(f"got {len(values)} labels for {count} images; give one, or one per image")
        return torch.tensor([self._label_id(value) for value in values], device=self.device)

    def batches(
        self, rows: Tensor, labels: Label | Sequence[Label], batch_size: int
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Images or tokens, `batch_size` at a time: their place among all, themselves, and their class ids or None."""
        ids = self.label_ids(labels, len(rows))
        for start in range(0, len(rows), batch_size):
            place = slice(start, start + batch_size)
            yield place, rows[place], None if ids is None else ids[place]

    def _label_id(self, label: Label) -> int:
        classes = self.prior.num_classes
        if label is None:
            return classes
        if isinstance(label, str) and label in self.labels:
            return self.labels.index(label)
        if isinstance(label, (int, np.integer)) and not isinstance(label, bool) and 0 <= label < classes:
            return int(label)
        there = f"ids 0 to {classes - 1}" + (f" or names {', '.join(self.labels)}" if self.labels else "")
        raise ValueError(f"no class is called {label!r}; there are {there if classes else 'none: it is unconditional'}")

    def to_images(self, images: Any) -> Tensor:
        """Float `(B, C, H, W)` in [-1, 1] on the pipeline's device, from images as users have them; see
        `pictures.as_batch`. Warns once of floats that look like [0, 1]."""
        batch = as_batch(images, self.tokenizer.image_shape)
        warn_if_unit(batch)
        return to_images(batch, self.tokenizer.image_shape).to(self.device)
