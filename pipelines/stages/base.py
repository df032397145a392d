"""Both stages in one folder: a tokenizer, the prior over its ids, and what is known of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL.Image import Image as PILImage
from torch import Tensor

from prior import Prior
from prior.orders import as_tensor
from prior.sampling import check_count
from tokenizer import Tokenizer
from tokenizer.files import ConfigError, IntegrityError

from .. import saving
from ..anomaly.calibration import Calibration
from ..images.pictures import as_batch, convert_images, to_images, warn_if_unit
from ..saving import BACKGROUND, FILES, INDEX, check_labels, make_sampler, resolve_pipeline
from .compiled import unwrapped
from .watching import Interruptible, progress_of_long, serialized

Images = PILImage | Tensor | np.ndarray | Sequence[PILImage | Tensor | np.ndarray]
Label = int | str | None
S = TypeVar("S", bound="Stages")


class Stages(Interruptible):
    """A tokenizer and a prior that fit each other, saved and loaded as one folder; `ImagePipeline` says what for.

    labels: the names of the classes, in the order of their ids. sampler: defaults for the settings of sampling, those
    that the prior's `Sampling` declares. Raises `IntegrityError` when the prior was trained on another tokenizer,
    `ConfigError` for names or settings that do not go with the prior.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prior: Prior,
        background: Prior | None = None,
        *,
        labels: Sequence[str] = (),
        sampler: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        tokenizer, prior = unwrapped(tokenizer, Tokenizer, "tokenizer"), unwrapped(prior, Prior, "prior")
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
        self.replaced = False
        self.labels = list(labels)
        self.sampler = make_sampler(type(prior), sampler or {})
        try:
            prior.check_sampling_options(self.sampler)
        except ValueError as error:
            raise ConfigError(f"{INDEX}: sampler: {error}") from error
        self.provenance: dict[str, Any] = {}
        self.sample_grid: np.ndarray | None = None
        self.calibration: Calibration | None = None
        self.background: Prior | None = None
        if background is not None:
            self.set_background(background)
        self.progress_bar_config: dict[str, Any] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """Stage one. Another may be put in its place (see `saving.instead`), also one that `torch.compile` wrapped."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, model: Tokenizer) -> None:
        self._tokenizer = saving.instead(self, "_tokenizer", unwrapped(model, Tokenizer, "tokenizer"))

    @property
    def prior(self) -> Prior:
        """Stage two. Another may be put in its place (see `saving.instead`), also one that `torch.compile` wrapped."""
        return self._prior

    @prior.setter
    def prior(self, model: Prior) -> None:
        self._prior = saving.instead(self, "_prior", unwrapped(model, Prior, "prior"))

    @property
    def components(self) -> dict[str, Any]:
        """The models by the names of their arguments: `ImagePipeline(**pipe.components, labels=pipe.labels)` is
        another pipeline of the same models."""
        models = {"tokenizer": self.tokenizer, "prior": self.prior, BACKGROUND: self.background}
        return {name: model for name, model in models.items() if model is not None}

    def set_progress_bar_config(self, **options: Any) -> None:
        """Arguments of `tqdm` for the bars of long calls: `disable`, `leave`, `desc`, ... A call replaces those before;
        without any, the bars are as they were. Calls that are under way keep theirs."""
        self.progress_bar_config = options

    def set_background(self, prior: Prior) -> None:
        """Keep a background prior beside the prior: one trained on perturbed tokens (`method="ratio"`). Raises
        `IntegrityError` for a prior over other tokens or classes."""
        prior = unwrapped(prior, Prior, BACKGROUND)
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

    @serialized
    @torch.no_grad()
    def encode(self, images: Any, *, batch_size: int = 256) -> Tensor:
        """Tokens `(B, *grid.shape)` of PIL images, or of uint8 or float in [-1, 1]: tensors `(B, C, H, W)`, arrays
        `(B, H, W, C)` or `(H, W, C)`, or a list of single ones.

        On a CPU image k has the same ids in any batch; `batch_size`: images at a time on other devices.
        """
        return self.encode_batch(self.to_images(images), batch_size=batch_size)

    @serialized
    @torch.no_grad()
    def encode_batch(self, batch: Tensor, *, batch_size: int = 256) -> Tensor:
        """`encode` of images as `to_images` returns them: float `(B, C, H, W)` in [-1, 1]."""
        parts = self._parts(batch.to(self.device, self.dtype), batch_size, "encoding", self.progress_bar_config)
        return torch.cat([self.tokenizer.encode(part) for part in parts])

    @serialized
    @torch.no_grad()
    def decode(self, tokens: Any, *, output_type: str = "pil", batch_size: int = 256, progress: bool = True) -> Any:
        """Images of `tokens` `(B, *grid.shape)`, a tensor, an array or lists; or of the first k, `(B, k)`, where these
        decode (`titok` with `keep`).
        Raises `ValueError` for ids out of range.

        On a CPU image k has the same pixels in any batch; `batch_size`: images at a time on other devices.
        """
        rows = as_tensor(tokens, self.device)
        parts = self._parts(rows, batch_size, "decoding", progress and self.progress_bar_config)
        return convert_images(torch.cat([self.tokenizer.decode(part) for part in parts]), output_type)

    def _parts(self, rows: Tensor, batch_size: int, what: str, bar: bool | Mapping[str, Any]) -> Iterable[Tensor]:
        """Images or tokens in the batches that the tokenizer takes: on a CPU one at a time, as the libraries behind
        torch choose kernels by the size of the batch, and kernels round differently: an 8-bit pixel could change.
        Raises `ValueError` for a size below 1."""
        check_count(batch_size, "batch_size")
        one = self.device.type == "cpu"  # a clone is aligned in memory, so all images are alike
        parts = [part.clone() if one else part for part in rows.split(1 if one else batch_size)]
        return progress_of_long(parts, bar, what)

    @serialized
    def reconstruct(self, images: Any, *, output_type: str = "pil") -> Any:
        """`decode(encode(images))`: what the tokenizer keeps of them."""
        return self.decode(self.encode(images), output_type=output_type)

    # Saving and loading

    @serialized
    def save_pretrained(
        self, folder: str | Path, *, variant: str | None = None, sample_grid: np.ndarray | None = None
    ) -> None:
        """Write the pipeline folder, whole or not at all; an older pipeline there is replaced.

        variant: "fp16" or "bf16" rounds the weights of all models to that type (except those that are always float32),
        into files such as `tokenizer/model.fp16.safetensors`; a folder holds one variant. sample_grid: uint8 (H, W, 3),
        shown on the model card. Raises `PathError` if `folder` holds something else, `LimitError` for a grid that could
        not be loaded again, `ValueError` for weights that the type cannot hold, `IntegrityError` where a part was
        replaced by one that does not fit the other.
        """
        self.sample_grid = self.sample_grid if sample_grid is None else sample_grid
        saving.save(self, folder, variant)

    @classmethod
    def from_pretrained(
        cls: type[S],
        source: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        prior: Prior | None = None,
        background: Prior | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        variant: str | None = None,
        dtype: saving.Dtypes = None,
        device: str | torch.device | None = None,
        verify: bool = True,
    ) -> S:
        """Load from a folder, a Hub id, or by the name of a pipeline that comes with the package (`digits`). Raises a
        `PipelineLoadError` naming file, field, what was found and what is allowed.

        tokenizer, prior, background: models to use in place of the folder's, whose files are then not opened. What is
        known of the folder's (calibration, provenance, background) is left out, and of the default settings of sampling
        those stay that the given prior has. variant: "fp16" or "bf16", where the weights are such; None takes what is
        there. dtype: of the weights in memory, or one for each part,
        `{"tokenizer": torch.float32, "default": torch.bfloat16}`; "auto" is what the file holds, None is float32.
        force_download: fetch again what is in the cache. verify: compare the sha256 of every file with the manifest.
        """
        parts = saving.given_parts(tokenizer=tokenizer, prior=prior, background=background)
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        names = [name for name in FILES if name.split("/")[0] not in parts]
        folder = resolve_pipeline(source, names, force_download=force_download, **options)
        pipeline: S = saving.read(cls, folder, parts, variant, verify)
        saving.convert(pipeline, parts, dtype)
        return pipeline.to(device=device)

    @serialized
    def to(
        self: S, device: str | int | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> S:
        """Move all models to `device`, and change the type of their weights; returns itself. As for torch's modules a
        dtype may come first if it is alone: `to("cuda")`, `to(torch.bfloat16)`, `to("cuda", torch.bfloat16)`."""
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise TypeError(f"to() takes a device, a dtype, or a device and then a dtype (got {device}, {dtype})")
            device, dtype = None, device
        for model in self.components.values():
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
        return torch.tensor([self._label_id(value) for value in values], dtype=torch.long, device=self.device)

    def class_names(self, ids: Tensor) -> list[str]:
        """The names of class ids `(B,)`, or their numbers where they have no names; "" for the null class."""
        names = [*(self.labels or map(str, range(self.prior.num_classes))), ""]
        return [names[number] for number in ids.tolist()]

    def batches(
        self, rows: Tensor, labels: Label | Sequence[Label], batch_size: int
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield images or tokens, `batch_size` at a time: their place among all, the rows, and their class ids or None.
        Without any rows, yield one empty batch."""
        check_count(batch_size, "batch_size")
        ids = self.label_ids(labels, len(rows))
        starts = range(0, max(1, len(rows)), batch_size)
        for start in progress_of_long(starts, self.progress_bar_config, "scoring"):
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
