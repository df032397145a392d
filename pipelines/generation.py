"""`ImagePipeline`: a tokenizer and a prior in one folder, from which images are sampled, completed and scored."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image as PILImage
from torch import Tensor

from prior import Prior
from prior.requests import Order
from prior.sampling import Generators, image_generators, progress_over
from tokenizer import Tokenizer
from tokenizer.pretrained import resolve_folder
from tokenizer.storage import (
    MANIFEST,
    ConfigError,
    IntegrityError,
    PathError,
    atomic_folder,
    read_json,
    verify_manifest,
    write_json,
    write_manifest,
)

from .card import model_card
from .index import CARD, FILES, FORMAT_VERSION, GRID, INDEX, PROVENANCE, SamplerDefaults, read_index
from .pictures import check_output_type, convert_images, grid_picture, read_picture, save_picture, to_images

Images = PILImage | Sequence[PILImage] | Tensor
Label = int | str | None


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: a list of PIL images, uint8 (B, H, W, C), or float (B, C, H, W); `tokens`: (B, *grid.shape)."""

    images: Any
    tokens: Tensor


class LikelihoodError(ValueError):
    """A density of pixels was asked for, and the tokenizer's decoder has none."""


class ImagePipeline:
    """Both stages of image generation.

    labels: the names of the classes, in the order of their ids. sampler: defaults for `__call__`'s `temperature`,
    `top_k`, `top_p`, `guidance_scale` and `steps`. Raises `IntegrityError` when the prior was trained on another
    tokenizer.
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
        self.tokenizer, self.prior = tokenizer.eval(), prior.eval()
        self.labels = list(labels)
        self.sampler = SamplerDefaults(**(sampler or {}))
        if self.sampler.steps is not None and "steps" not in self._prior_takes():
            raise ConfigError(f"{INDEX}: sampler: steps: a {prior.name!r} prior does not decode in steps")
        if self.sampler.steps is not None and self.sampler.steps > len(prior.grid):
            raise ConfigError(
                f"{INDEX}: sampler: steps: {self.sampler.steps} are more than the {len(prior.grid)} tokens"
            )
        self.provenance: dict[str, Any] = {}
        self.sample_grid: np.ndarray | None = None

    def __repr__(self) -> str:
        grid, shape = self.prior.grid, "x".join(map(str, self.tokenizer.image_shape))
        return (
            f"ImagePipeline({self.tokenizer.name} + {self.prior.name}, images {shape}, tokens "
            f"{'x'.join(map(str, grid.shape))} of {grid.vocab_size}, {self.prior.num_classes} classes)"
        )

    # Making images

    def __call__(
        self,
        num_images: int | None = None,
        labels: Label | Sequence[Label] = None,
        *,
        seed: int | None = None,
        generator: Generators = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        tokens: Tensor | None = None,
        known: Tensor | None = None,
        order: Order = None,
        num_orders: int = 1,
        cache: bool = True,
        parallel: bool = False,
        batch_size: int = 64,
        output_type: str = "pil",
        progress: bool = True,
        **own: Any,
    ) -> PipelineOutput:
        """Sample images.

        labels: one class (id or name) for all, or one per image; None is unconditional. seed: image k uses seed + k,
        whatever `batch_size` is. tokens, known, order, num_orders, cache, parallel: as in `Prior.sample`; own: what
        else this prior's `sample` takes (`guess`; `steps`, `confidence_temperature` and `schedule` of a masked-token
        prior). The sampling settings default to the pipeline's own (`self.sampler`), `steps` only where none of
        `order`, `num_orders`, `cache` and `parallel` is given, as these do not go with it. output_type: "pil", "np"
        (uint8) or "pt" (float in [-1, 1]). Raises `ValueError` for arguments out of range.
        """
        if unknown := set(own) - self._prior_takes():
            raise TypeError(f"{sorted(unknown)[0]!r} is no argument of sampling from a {self.prior.name!r} prior")
        if isinstance(labels, (Tensor, np.ndarray)):
            labels = labels.tolist()
        num_images = count_images(num_images, labels)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 (got {batch_size})")
        ids = self.label_ids(labels, num_images)
        choices = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
        in_steps = order is None and num_orders == 1 and cache and not parallel
        own = self._settings(choices, ids, steps=in_steps) | own
        check_output_type(output_type)
        generators = seeded(seed, generator, num_images)
        shape, parts = (num_images, *self.prior.grid.shape), []
        check_shapes(shape, tokens=tokens, known=known)
        batches = range(0, num_images, batch_size)
        for start in progress_over(batches, progress and len(batches) > 1, unit="batch"):
            rows = slice(start, min(start + batch_size, num_images))
            kept = None if known is None else known.expand(shape)[rows]
            given = None if tokens is None else tokens.expand(shape)[rows]
            parts.append(self.prior.sample(
                rows.stop - rows.start, None if ids is None else ids[rows], generator=generators[rows], tokens=given,
                known=kept, order=order_of(order, rows), num_orders=num_orders, cache=cache, parallel=parallel,
                progress=progress and len(batches) == 1, **own))  # fmt: skip
        drawn = torch.cat(parts)
        return PipelineOutput(self.decode(drawn, output_type=output_type), drawn)

    def _settings(self, choices: dict[str, Any], ids: Tensor | None, *, steps: bool) -> dict[str, Any]:
        """The sampling settings chosen, and the pipeline's own for the others. Raises `ValueError` out of range."""
        settings = self.sampler.given() | {name: value for name, value in choices.items() if value is not None}
        if choices["guidance_scale"] is None and (ids is None or bool((ids == self.prior.num_classes).all())):
            settings["guidance_scale"] = 1.0  # the default guides towards a class, and none was named
        if not steps:
            settings.pop("steps", None)
        SamplerDefaults(**settings)
        return settings

    @torch.no_grad()
    def complete(self, images: Any, known: Tensor, labels: Label | Sequence[Label] = None, *,
                 output_type: str = "pil", **kwargs: Any) -> PipelineOutput:  # fmt: skip
        """Fill in what is not known: bool `known` `(H, W)` or `(B, H, W)`, True = keep this pixel.

        A token is known when every pixel of its patch is, and only known tokens are looked at. A prior that takes any
        order (`prior.any_order`) walks them first, so that a new token is conditioned on all of them; with any other
        prior it is conditioned on those before it in its order. Known pixels come back as they were. `kwargs` as for
        `__call__`. Raises `ValueError` for a mask of another shape.
        """
        batch = self.to_images(images)
        shape = (len(batch), *batch.shape[2:])
        known = torch.as_tensor(known, device=batch.device)
        if known.dtype != torch.bool or tuple(known.shape) not in (shape, shape[1:]):
            raise ValueError(
                f"known should be bool of shape {shape[1:]} or {shape}, got {known.dtype} of {tuple(known.shape)}"
            )
        known = known.expand(shape)
        mask = known.unsqueeze(1)
        # What is hidden is painted over before encoding, or it would leak through the encoder's receptive field.
        mean = (batch * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1)
        tokens = self.tokenizer.encode(torch.where(mask, batch, mean).to(self.dtype))
        out = self(
            len(batch), labels, tokens=tokens, known=self.tokenizer.known_tokens(known), output_type="pt", **kwargs
        )
        filled = torch.where(mask, batch, out.images.to(batch.device))
        return PipelineOutput(convert_images(filled, output_type), out.tokens)

    # Between images and tokens

    @torch.no_grad()
    def encode(self, images: Any, *, batch_size: int = 256) -> Tensor:
        """Tokens `(B, *grid.shape)` of PIL images, a list of them, uint8 `(B, C, H, W)`, or float in [-1, 1]."""
        batch = self.to_images(images)
        return torch.cat([self.tokenizer.encode(part.to(self.dtype)) for part in batch.split(batch_size)])

    @torch.no_grad()
    def decode(self, tokens: Tensor, *, output_type: str = "pil", batch_size: int = 256) -> Any:
        """Images of `tokens` `(B, *grid.shape)`. Raises `ValueError` for ids out of range."""
        parts = tokens.to(self.device).split(batch_size)
        return convert_images(torch.cat([self.tokenizer.decode(part) for part in parts]), output_type)

    def reconstruct(self, images: Any, *, output_type: str = "pil") -> Any:
        """`decode(encode(images))`: what the tokenizer keeps of them."""
        return self.decode(self.encode(images), output_type=output_type)

    # Scoring images

    @torch.no_grad()
    def log_prob(self, images: Any, labels: Label | Sequence[Label] = None, *, order: Order = None, num_orders: int = 1,
                 batch_size: int = 256) -> Tensor:  # fmt: skip
        """log p of each image's tokens under the prior, `(B,)` nats (of the class given; else unconditional).

        order, num_orders: as in `Prior.log_prob`. Where `prior.exact` is False it is a bound.
        """
        tokens = self.encode(images, batch_size=batch_size)
        return self._token_log_prob(tokens, labels, order, num_orders, batch_size)

    def _token_log_prob(self, tokens: Tensor, labels: Label | Sequence[Label], order: Order, num_orders: int,
                        batch_size: int) -> Tensor:  # fmt: skip
        ids, parts = self.label_ids(labels, len(tokens)), []
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            given = None if ids is None else ids[rows]
            parts.append(self.prior.log_prob(tokens[rows], given, order_of(order, rows), num_orders))
        return torch.cat(parts)

    @torch.no_grad()
    def bits_per_dim(self, images: Any, labels: Label | Sequence[Label] = None, *, order: Order = None,
                     num_orders: int = 1, batch_size: int = 256) -> Tensor:  # fmt: skip
        """Bits per pixel channel of each image, `(B,)`: those of its tokens under the prior plus those of its pixels
        given the tokens; an upper bound where `prior.exact` is False. order, num_orders: as in `Prior.log_prob`.
        Raises `LikelihoodError` when the tokenizer's decoder has no likelihood."""
        batch = self.to_images(images)
        tokens, parts = self.encode(batch, batch_size=batch_size), []
        for part, ids in zip(batch.split(batch_size), tokens.split(batch_size), strict=True):
            pixels = self.tokenizer.pixel_log_prob(part, ids)
            if pixels is None:
                raise LikelihoodError(
                    f"bits_per_dim needs a decoder with a likelihood, and {self.tokenizer.name!r} as it was "
                    "trained has none; log_prob gives the prior's part alone"
                )
            parts.append(pixels)
        nats = self._token_log_prob(tokens, labels, order, num_orders, batch_size) + torch.cat(parts)
        return -nats / (batch[0].numel() * np.log(2))

    # Saving and loading

    def save_pretrained(self, folder: str | Path, *, sample_grid: np.ndarray | None = None) -> None:
        """Write the pipeline folder, whole or not at all; an older pipeline there is replaced.

        sample_grid: uint8 (H, W, 3), shown on the model card. Raises `PathError` if `folder` holds something else.
        """
        self.sample_grid = self.sample_grid if sample_grid is None else sample_grid
        if self.prior.config.tokenizer != self.tokenizer.fingerprint():  # another dtype has another fingerprint
            self.prior.config = dataclasses.replace(self.prior.config, tokenizer=self.tokenizer.fingerprint())
        index = {
            "_class_name": "ImagePipeline",
            "format_version": FORMAT_VERSION,
            "tokenizer": self.tokenizer.name,
            "prior": self.prior.name,
            "labels": self.labels,
            "sampler": self.sampler.given(),
        }
        with atomic_folder(folder, marker=INDEX) as target:
            self.tokenizer.save_pretrained(target / "tokenizer")
            self.prior.save_pretrained(target / "prior")
            write_json(target / INDEX, index)
            if self.provenance:
                write_json(target / PROVENANCE, self.provenance)
            if self.sample_grid is not None:
                save_picture(self.sample_grid, target / GRID)
            (target / CARD).write_text(model_card(self), encoding="utf-8")
            write_manifest(target)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, token: str | None = None,
                        cache_dir: str | Path | None = None, local_files_only: bool = False,
                        dtype: torch.dtype | None = None, device: str | torch.device | None = None
                        ) -> ImagePipeline:  # fmt: skip
        """Load from a folder or a Hub id. Raises a `PipelineLoadError` naming file, field, what was found and what is
        allowed; every file is checked against the manifest first."""
        folder = resolve_folder(
            source, FILES, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        if not (folder / INDEX).is_file():
            inner = folder / "pipeline"
            hint = f"; did you mean {inner}?" if (inner / INDEX).is_file() else ""
            raise PathError(f"{folder}: not a pipeline folder (no {INDEX}){hint}")
        index = read_index(folder / INDEX)
        listed = verify_manifest(folder)["files"]
        unlisted = [name for name in FILES if name != MANIFEST and name not in listed and (folder / name).exists()]
        if unlisted:
            raise IntegrityError(f"{folder / MANIFEST}: files: does not list {', '.join(unlisted)}")
        tokenizer = Tokenizer.find(index["tokenizer"]).from_pretrained(folder / "tokenizer")
        prior = Prior.find(index["prior"]).from_pretrained(folder / "prior")
        pipeline = cls(tokenizer, prior, labels=index["labels"], sampler=index["sampler"])
        if (folder / PROVENANCE).is_file():
            pipeline.provenance = read_json(folder / PROVENANCE)
        if (folder / GRID).is_file():
            pipeline.sample_grid = read_picture(folder / GRID)
        return pipeline.to(device=device, dtype=dtype)

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool | None = None,
                    commit_message: str = "Upload pipeline") -> Any:  # fmt: skip
        """Create the Hub repository if needed and upload the pipeline folder, model card and sample grid included.

        Returns what `HfApi.upload_folder` does. Errors are huggingface_hub's.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "pipeline"
            grid = self.sample_picture() if self.sample_grid is None else self.sample_grid
            self.save_pretrained(folder, sample_grid=grid)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> ImagePipeline:
        """Move both stages to `device`, and change the type of their weights; returns itself."""
        self.tokenizer.to(device=device, dtype=dtype)
        self.prior.to(device=device, dtype=dtype)
        return self

    # Conveniences

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.prior.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the tokenizer's weights."""
        return next((p.dtype for p in self.tokenizer.parameters()), torch.float32)

    def label_ids(self, labels: Label | Sequence[Label], count: int) -> Tensor | None:
        """Class ids `(count,)` of ids and names, or None. Raises `ValueError` naming what there is."""
        if labels is None:
            return None
        values = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels
        values = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values] * count
        if len(values) != count:
            raise ValueError(f"got {len(values)} labels for {count} images; give one, or one per image")
        return torch.tensor([self._label_id(value) for value in values], device=self.device)

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

    def _prior_takes(self) -> set[str]:
        return {name for sample in (Prior.sample, self.prior.sample) for name in inspect.signature(sample).parameters}

    def to_images(self, images: Any) -> Tensor:
        """Float `(B, C, H, W)` in [-1, 1] on the pipeline's device; see `pictures.to_images`."""
        return to_images(images, self.tokenizer.image_shape).to(self.device)

    def sample_picture(self, count: int = 80, seed: int = 0) -> np.ndarray:
        """A grid of samples at the pipeline's settings, one class per column (of at most ten), uint8 (H, W, 3)."""
        columns = min(10, self.prior.num_classes) or 10
        labels = [index % columns for index in range(count)] if self.prior.num_classes else None
        out = self(num_images=count, labels=labels, seed=seed, output_type="pt", progress=False)
        return grid_picture(out.images, columns)


def seeded(seed: int | None, generator: Generators, count: int) -> list[torch.Generator]:
    """A generator per image: of seed + k, or from `generator`. Raises `ValueError` if both are given."""
    if seed is None:
        return image_generators(generator, count)
    if generator is not None:
        raise ValueError("give seed or generator, not both")
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


def order_of(order: Order, rows: slice) -> Order:
    """The part of `order` that belongs to `rows`, where there is one per image."""
    return order if order is None or isinstance(order, str) or np.ndim(order) < 2 else order[rows]


def count_images(num_images: int | None, labels: Any) -> int:
    """`num_images`, or one per label. Raises `ValueError` below 1."""
    if num_images is None:
        num_images = len(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else 1
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1 (got {num_images})")
    return num_images


def check_shapes(shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Raise `ValueError` naming a tensor that has not the shape `(B, *grid.shape)`, or that of one image."""
    for name, value in tensors.items():
        if value is not None and tuple(value.shape) not in (shape, shape[1:]):
            raise ValueError(f"{name} should have shape {shape[1:]} or {shape}, got {tuple(value.shape)}")
