"""`ImagePipeline`: a tokenizer and a prior in one folder, from which images are sampled, completed and scored."""

from __future__ import annotations

import copy
import inspect
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from PIL.Image import Image as PILImage
from torch import Tensor

from prior import Prior
from prior.sampling import (
    GUIDANCE,
    DecodingOptions,
    Generators,
    Order,
    SamplingOptions,
    Step,
    as_tensor,
    check_count,
    check_known,
    progress_bar,
    select_order,
    whole_number,
)
from tokenizer import Tokenizer
from tokenizer.base import LikelihoodError
from tokenizer.files import ConfigError
from tokenizer.model import Dtype, choose_dtype

from . import completion, representation, saving
from .anomaly import calibrating, healing, scores
from .anomaly.calibration import Calibration
from .compression.coding import compress, decompress, exact_pixels
from .images.grids import class_grid
from .images.origin import shareable
from .images.pictures import LATENT, check_output_type, convert_images, to_images, to_uint8
from .processes.group import ALONE, ProcessGroup

Images = PILImage | Tensor | np.ndarray | Sequence[PILImage | Tensor | np.ndarray]
Label = int | str | None
Callback = Callable[[Any, int, int, dict[str, Tensor]], Any]
"""`callback_on_step_end`; see `ImagePipeline.__call__`."""

SAMPLED = 80  # images of a sample picture
LOWEST_SEED, LAST_SEED = -(1 << 63), (1 << 64) - 1  # of torch

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
P = TypeVar("P", bound="ImagePipeline")


class PipelineOutput(NamedTuple):
    """What a call returns; `images, tokens, class_names = pipe(4)` unpacks it."""

    images: Any
    """A list of PIL images, uint8 (B, H, W, C), or float (B, C, H, W)."""
    tokens: Tensor
    """`(B, *grid.shape)`."""
    class_names: list[str] | None = None
    """That of each image, "" for the null class; None if no image has a class."""

    def grid(self, columns: int | None = None, *, labels: bool = True) -> PILImage:
        """All images in one picture: a column for each class, with its name on top; with `columns`, in their order,
        the name above each image. labels: False writes no names. Completions (`draws`) of an image stand in a row.

        Small images are enlarged by a whole number, until a name fits over them. Raises `ValueError` for an output of
        `output_type="latent"`, which has no images, and for fewer than 1 column.
        """
        if columns is not None and columns < 1:
            raise ValueError(f"columns must be at least 1 (got {columns})")
        if self.images is self.tokens:
            raise ValueError("grid: these are tokens; pipe.decode(out.tokens) makes images of them")
        images, draws = self.images, None
        if isinstance(images, list):
            if isinstance(images[0], list):
                draws, images = len(images[0]), [image for each in images for image in each]
            pixels = np.stack([np.asarray(image) for image in images])
            pixels = pixels.reshape(*pixels.shape[:3], -1)
        else:
            if images.ndim == 5:
                draws, images = images.shape[1], images.reshape(-1, *images.shape[2:])
            pixels = to_uint8(images.cpu()).movedim(1, -1).numpy() if isinstance(images, Tensor) else images
        names = self.class_names if draws is None else None
        return Image.fromarray(class_grid(pixels, names, columns or draws, captions=labels))


def serialized(method: F) -> F:
    """Let one thread at a time run such methods of a pipeline. A callback may call the pipeline again."""

    @wraps(method)
    def call(pipeline: ImagePipeline, *args: Any, **kwargs: Any) -> Any:
        with pipeline._lock:
            return method(pipeline, *args, **kwargs)

    return cast(F, call)


class ImagePipeline:
    """A tokenizer and a prior over its tokens, saved and loaded as one folder.

    labels: the names of the classes, in the order of their ids. sampler: defaults for the settings of sampling, those
    that the prior's `Sampling` declares. Raises `IntegrityError` when the prior was trained on another tokenizer,
    `ConfigError` for names or settings that do not go with the prior.

    `calibration`, `provenance` and `sample_grid` describe the models that are there: a pipeline forgets what was
    measured of a model when another takes its place, as in `pipe.prior = other`.

    Completion, anomaly scores and features are functions of other modules, whose first argument is the pipeline.
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
        saving.check_fit(tokenizer, prior, background)
        if labels and len(labels) != prior.num_classes:
            raise ConfigError(f"{saving.INDEX}: labels: {len(labels)} names for {prior.num_classes} classes")
        saving.check_labels(labels)
        self.tokenizer, self.prior = tokenizer.eval(), prior.eval()
        self.background = None if background is None else background.eval()
        """A prior that was trained on perturbed tokens, for `anomaly_score(method="ratio")`."""
        self.labels = list(labels)
        self.sampler = saving.make_sampler(prior, sampler or {})
        self.provenance: dict[str, Any] = {}
        self.sample_grid: np.ndarray | None = None
        self.calibration: Calibration | None = None
        self.progress_bar_config: dict[str, Any] = {}
        self._lock = threading.RLock()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in saving.PARTS and getattr(self, name, value) is not value:
            self.calibration = None
            if name != saving.BACKGROUND:  # which makes no images
                self.provenance, self.sample_grid = {}, None
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock: a copy has its own."""
        return {key: value for key, value in vars(self).items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def __repr__(self) -> str:
        grid, shape = self.prior.grid, "x".join(map(str, self.tokenizer.image_shape))
        return (
            f"{type(self).__name__}({self.tokenizer.name} + {self.prior.name}, images {shape}, tokens "
            f"{'x'.join(map(str, grid.shape))} of {grid.vocab_size}, {self.prior.num_classes} classes)"
        )

    # Sampling

    @serialized
    def __call__(
        self,
        num_images: int | None = None,
        labels: Label | Sequence[Label] = None,
        *,
        num_images_per_label: int | None = None,
        seed: int | None = None,
        generator: Generators = None,
        tokens: Tensor | None = None,
        known: Tensor | None = None,
        order: Order = None,
        num_orders: int = 1,
        cache: bool = True,
        parallel: bool = False,
        batch_size: int = 64,
        output_type: str = "pil",
        progress: bool = True,
        callback_on_step_end: Callback | None = None,
        **settings: Any,
    ) -> PipelineOutput:
        """Sample images.

        labels: one class (id or name) for all, or one per image; None is unconditional. num_images_per_label: the
        number of images of each label, one label after another, in place of `num_images`. seed: image k uses seed + k,
        whatever `batch_size` is. tokens, known, order, num_orders, cache, parallel: as in `Prior.sample`. output_type:
        "pil", "np" (uint8), "pt" (float in [-1, 1]), or "latent": the tokens, not decoded. progress: False shows no
        bar, whatever `set_progress_bar_config` says.

        callback_on_step_end: called as `f(pipe, step, rank, {"tokens": ..., "known": ...})` after each step: step
        counts from 0 over all batches; rank is how far along their order the images being drawn have come; tokens
        `(B, *grid.shape)` are those of all images so far (0 where none is drawn) and known says which these are. Both
        are copies. What it returns is ignored; what it raises ends the call.

        settings: those that the prior's `Sampling` declares (`temperature`, `top_k`, `top_p`, `guidance_scale`,
        `guidance_end`, `guidance_power`; `steps`, `confidence_temperature` and `schedule` of a masked-token prior).
        They default to the pipeline's own (`pipeline.sampler`), `steps` only where none of `order`, `num_orders`,
        `cache` and `parallel` is given, as these do not go with it. The course of guidance is one choice: a
        `guidance_scale` that is given is constant unless `guidance_end` is given too, and a `guidance_end` is linear
        unless `guidance_power` is. Raises `ValueError` for arguments out of range, `TypeError` for a setting that the
        prior does not have.
        """
        num_images, labels = count_images(num_images, labels, num_images_per_label)
        check_count(batch_size, "batch_size")
        check_output_type(output_type, LATENT)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"callback_on_step_end should be a function (got {callback_on_step_end!r})")
        ids = self.label_ids(labels, num_images)
        decoding = DecodingOptions(order, num_orders, cache, parallel)
        sampler = self.choose_sampler(settings, ids, decoding)
        generator = make_generators(seed, generator, num_images)
        shape = (num_images, *self.prior.grid.shape)
        tokens, known = (each.reshape(shape) for each in check_known(self.prior, tokens, known, num_images))
        drawn, done, rows, number = tokens.clone(), known.clone(), slice(0), 0

        def report(step: Step) -> None:
            nonlocal number
            drawn[rows], done[rows] = step.tokens, step.known
            if callback_on_step_end is not None:
                callback_on_step_end(self, number, step.rank, {"tokens": drawn.clone(), "known": done.clone()})
            number += 1

        batches = range(0, num_images, batch_size)
        bar: Any = self.progress_bar_config if progress else False
        for start in progress_bar(batches, bar if len(batches) > 1 else False, unit="batch"):
            rows = slice(start, min(start + batch_size, num_images))
            drawn[rows] = self.prior.sample(
                rows.stop - rows.start,
                None if ids is None else ids[rows],
                generator=generator[rows] if isinstance(generator, Sequence) else generator,
                tokens=tokens[rows],
                known=known[rows],
                progress=bar if len(batches) == 1 else False,
                on_step=report if callback_on_step_end else None,
                **vars(decoding.select(rows, num_images)),
                **vars(sampler),
            )
            done[rows] = True
        if output_type == LATENT:
            images: Any = drawn
        else:
            images = self.decode(drawn, output_type=output_type, batch_size=batch_size, progress=progress)
        names = [] if ids is None else self.class_names(ids)
        return PipelineOutput(images, drawn, names if any(names) else None)

    def choose_sampler(
        self, settings: dict[str, Any], ids: Tensor | None, decoding: DecodingOptions
    ) -> SamplingOptions:
        """The sampling settings given, and the pipeline's own for the others. None stands for the pipeline's own of
        those that every prior has. Raises `TypeError` for a setting that the prior does not have, `ValueError` out of
        range."""
        known = self.prior.Sampling.names()
        if unknown := [name for name in settings if name not in known]:
            near = get_close_matches(unknown[0], [*known, *inspect.signature(self.__call__).parameters], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"its settings are {', '.join(known)}"
            raise TypeError(f"{unknown[0]!r} is no argument of sampling from a {self.prior.name!r} prior; {hint}")
        own = self.sampler if decoding.is_default else self.sampler.for_given_order()
        labelled = ids is not None and bool((ids != self.prior.num_classes).any())
        if not labelled:
            own = own.unguided()  # the default guides towards a class, and there is none
        shared = SamplingOptions.names()
        chosen = {name: value for name, value in settings.items() if value is not None or name not in shared}
        defaults = dict(vars(own))
        for number, name in enumerate(GUIDANCE, 1):
            if name in chosen:  # the pipeline's course of guidance is not the one that is asked for
                defaults.update(dict.fromkeys(GUIDANCE[number:]))
        sampler = self.prior.make_sampling_options(**{**defaults, **chosen})
        sampler.check_guidance(labelled)
        return sampler

    complete = serialized(completion.complete)

    # Between images and tokens

    @serialized
    @torch.no_grad()
    def encode(self, images: Images, *, batch_size: int = 256) -> Tensor:
        """Tokens `(B, *grid.shape)` of PIL images, or of uint8 or float in [-1, 1]: tensors `(B, C, H, W)`, arrays
        `(B, H, W, C)` or `(H, W, C)`, or a list of single ones."""
        return self.encode_batch(self.to_images(images), batch_size=batch_size)

    @serialized
    @torch.no_grad()
    def encode_batch(self, batch: Tensor, *, batch_size: int = 256) -> Tensor:
        """`encode` of images as `to_images` returns them: float `(B, C, H, W)` in [-1, 1]."""
        parts = batch.to(self.device, self.dtype).split(check_count(batch_size, "batch_size"))
        return torch.cat([self.tokenizer.encode(part) for part in self._with_bar(parts, "encoding")])

    @serialized
    @torch.no_grad()
    def decode(self, tokens: Any, *, output_type: str = "pil", batch_size: int = 256, progress: bool = True) -> Any:
        """Images of `tokens` `(B, *grid.shape)`, a tensor, an array or lists; or of the first k, `(B, k)`, where these
        decode (`titok` with `keep`). Raises `ValueError` for ids out of range."""
        parts = as_tensor(tokens, self.device).split(check_count(batch_size, "batch_size"))
        images = [self.tokenizer.decode(part) for part in (self._with_bar(parts, "decoding") if progress else parts)]
        return convert_images(torch.cat(images), output_type)

    @serialized
    def reconstruct(self, images: Images, *, output_type: str = "pil", batch_size: int = 256) -> Any:
        """`decode(encode(images))`: what the tokenizer keeps of them."""
        tokens = self.encode(images, batch_size=batch_size)
        return self.decode(tokens, output_type=output_type, batch_size=batch_size)

    def to_images(self, images: Images) -> Tensor:
        """Float `(B, C, H, W)` in [-1, 1] on the pipeline's device, from images as users have them; see
        `pictures.as_batch`. Warns once of floats that look like [0, 1]."""
        return to_images(images, self.tokenizer.image_shape).to(self.device)

    def batches(
        self, rows: Tensor, labels: Label | Sequence[Label], batch_size: int
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield images or tokens, `batch_size` at a time: their place among all, the rows, and their class ids or None.
        Without any rows, yield one empty batch."""
        check_count(batch_size, "batch_size")
        ids = self.label_ids(labels, len(rows))
        for start in self._with_bar(range(0, max(1, len(rows)), batch_size), "scoring"):
            place = slice(start, start + batch_size)
            yield place, rows[place], None if ids is None else ids[place]

    def _with_bar(self, parts: Sequence[T], what: str) -> Iterable[T]:
        """Iterate over `parts`, with a bar if they take longer than two seconds, unless another bar is shown."""
        from tqdm import tqdm

        if len(parts) < 2 or len(getattr(tqdm, "_instances", ())):
            return parts
        return progress_bar(parts, {"desc": what, "delay": 2.0, **self.progress_bar_config}, unit="batch")

    # Classes

    def label_ids(self, labels: Label | Sequence[Label], count: int) -> Tensor | None:
        """Class ids `(count,)` of ids and names, or None. Raises `ValueError` naming what there is."""
        if labels is None:
            return None
        values = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels
        values = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values] * count
        if len(values) != count:
            raise ValueError(f"got {len(values)} labels for {count} images; give one, or one per image")
        return torch.tensor([self._label_id(value) for value in values], dtype=torch.long, device=self.device)

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

    def class_names(self, ids: Tensor) -> list[str]:
        """The names of class ids `(B,)`, or their numbers where they have no names; "" for the null class."""
        names = [*(self.labels or map(str, range(self.prior.num_classes))), ""]
        return [names[number] for number in ids.tolist()]

    # Scoring images

    @serialized
    @torch.no_grad()
    def log_prob(
        self,
        images: Images,
        labels: Label | Sequence[Label] = None,
        *,
        order: Order = None,
        num_orders: int = 1,
        num_masks: int = 1,
        batch_size: int = 256,
    ) -> Tensor:
        """log p of each image's tokens under the prior, `(B,)` nats (of the class given; else unconditional).

        order, num_orders, num_masks: as in `Prior.log_prob`. Where `prior.exact` is False an image's is an unbiased
        estimate of a lower bound, and the mean over images bounds.
        """
        batch, parts = self.to_images(images), []
        for rows, part, ids in self.batches(batch, labels, batch_size):
            own = select_order(order, rows, len(batch))
            parts.append(self.prior.log_prob(self.encode_batch(part), ids, own, num_orders, num_masks))
        return torch.cat(parts)

    @serialized
    @torch.no_grad()
    def bits_per_dim(
        self,
        images: Images,
        labels: Label | Sequence[Label] = None,
        *,
        order: Order = None,
        num_orders: int = 1,
        batch_size: int = 256,
    ) -> Tensor:
        """Bits per pixel channel of each image, `(B,)`: those of its tokens under the prior plus those of its pixels
        given the tokens; where `prior.exact` is False their mean over images is an upper bound. order, num_orders: as
        in `Prior.log_prob`. Raises `LikelihoodError` when the tokenizer's decoder has no likelihood."""
        batch, parts = self.to_images(images), []
        for rows, part, ids in self.batches(batch, labels, batch_size):
            tokens, own = self.encode_batch(part), select_order(order, rows, len(batch))
            pixels = self.tokenizer.pixel_log_prob(part, tokens)
            if pixels is None:
                raise LikelihoodError(
                    f"bits_per_dim needs a decoder with a likelihood, and {self.tokenizer.name!r} as it was "
                    "trained has none; log_prob gives the prior's part alone"
                )
            parts.append(self.prior.log_prob(tokens, ids, own, num_orders) + pixels)
        return -torch.cat(parts) / (batch.shape[1:].numel() * np.log(2))

    conditional_log_prob = serialized(completion.conditional_log_prob)

    # Finding anomalies

    calibrate = serialized(calibrating.calibrate)
    anomaly_score = serialized(scores.anomaly_score)
    anomaly_map = serialized(healing.anomaly_map)
    heal = serialized(healing.heal)

    # Images as vectors

    embed = serialized(representation.embed)
    nearest = serialized(representation.nearest)

    # Storing images

    @serialized
    def compress(self, images: Any, *, lossless: bool = False, progress: bool = True) -> bytes:
        """A stream from which this pipeline, and no other, decodes the same tokens, in any batch, on any machine.

        images: PIL images of exactly the pipeline's size, uint8 or float `(B, C, H, W)`. lossless: keep every pixel,
        by a decoder with a likelihood or a `pixels` tokenizer; else the tokens, whose images `decompress` gives: those
        of two machines differ by one grey level in some pixels, as the decoder's float32 rounds otherwise there.
        Raises `ValueError` for images of another size (lossless: or of more than 8 bits), `LikelihoodError` where
        lossless cannot be, and `StreamError` without the package constriction.
        """
        several, shape = [images] if isinstance(images, PILImage) else images, self.tokenizer.image_shape
        if isinstance(several, (list, tuple)):
            several = [exact_pixels(one, shape, lossless) if isinstance(one, PILImage) else one for one in several]
        return compress(self, self.to_images(several), lossless=lossless, progress=progress)

    @serialized
    def decompress(
        self,
        data: bytes,
        *,
        output_type: str = "pil",
        batch_size: int | None = None,
        max_images: int | None = None,
        progress: bool = True,
    ) -> Any:
        """The images of a stream, all of them or an error: of the same tokens as were compressed, and of the same
        pixels if it was lossless, else to within one grey level (of float32 weights). batch_size: images evaluated at a
        time, a whole chunk if None; tokens do not depend on it. max_images: refuse a stream of more.

        Raises `StreamError`: `DamagedStream` for one that is damaged, `ModelMismatch` for one of another pipeline, or
        of a machine that computes other probabilities.
        """
        check_output_type(output_type)
        images = decompress(self, data, batch_size=batch_size, max_images=max_images, progress=progress)
        return convert_images(images, output_type)

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
        cls: type[P],
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        variant: str | None = None,
        dtype: Dtype = None,
        device: str | torch.device | None = None,
        verify: bool = True,
    ) -> P:
        """Load from a folder, a Hub id, or by the name of a pipeline that comes with the package (`digits`). Raises a
        `PipelineLoadError` naming file, field, what was found and what is allowed.

        variant: "fp16" or "bf16", where the weights are such; None takes what is there. dtype: of the weights in
        memory; "auto" is what the file holds, None is float32. verify: compare the sha256 of every file with the
        manifest.
        """
        folder = saving.find_pipeline(
            source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        pipeline: P = saving.load(cls, folder, variant, verify)
        saving.change_dtype(pipeline, lambda model: choose_dtype(dtype, model.stored_dtype))
        return pipeline.to(device=device)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        commit_message: str = "Upload pipeline",
    ) -> Any:
        """Create the Hub repository if needed and upload the pipeline folder, with model card and sample grid, in one
        commit (revision: to this branch; create_pr: in a pull request). The commit removes files of an earlier pipeline
        and keeps all others. The name of a local folder of training images is left out. variant: as in
        `save_pretrained`.

        Returns huggingface_hub's `CommitInfo`. Raises `PushError`, an `OSError`, with the reason in one line.
        """
        from .hub import push_folder, require_reachable

        require_reachable(repo_id)
        with tempfile.TemporaryDirectory() as temporary:
            folder, shared = Path(temporary) / "pipeline", copy.copy(self)
            shared.provenance = shareable(self.provenance)
            grid = self.sample_picture() if self.sample_grid is None else self.sample_grid
            shared.save_pretrained(folder, variant=variant, sample_grid=grid)
            return push_folder(
                folder,
                repo_id,
                token=token,
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )

    def sample_picture(self, count: int = SAMPLED, seed: int = 0, group: ProcessGroup = ALONE) -> np.ndarray:
        """A grid of samples at the pipeline's settings, one class per column (of at most ten), whose name is on top,
        uint8 (H, W, 3). Each process of the group draws some of them."""
        columns = min(10, self.prior.num_classes) or 10
        size = -(-count // group.world)

        def draw(start: int) -> np.ndarray:
            rows = range(start, min(start + size, count))
            labels = [index % columns for index in rows] if self.prior.num_classes else None
            return self(num_images=len(rows), labels=labels, seed=seed + start, output_type="np", progress=False).images

        images = np.concatenate(group.map(draw, range(0, count, size)))
        names = self.class_names(torch.arange(count) % columns) if self.prior.num_classes else None
        return class_grid(images, names, columns)

    # Models

    @property
    def components(self) -> dict[str, Any]:
        """The models by the names of their arguments: `ImagePipeline(**pipe.components, labels=pipe.labels)` is
        another pipeline of the same models."""
        models = {"tokenizer": self.tokenizer, "prior": self.prior, saving.BACKGROUND: self.background}
        return {name: model for name, model in models.items() if model is not None}

    def set_background(self, prior: Prior) -> None:
        """Keep a background prior beside the prior: one trained on perturbed tokens (`method="ratio"`). Raises
        `IntegrityError` for a prior over other tokens or classes."""
        saving.check_fit(self.tokenizer, self.prior, prior)
        self.background = prior.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.prior.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the tokenizer's weights."""
        return self.tokenizer.dtype

    @serialized
    def to(
        self: P, device: str | int | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> P:
        """Move all models to `device`, and change the type of their weights; returns itself. As for torch's modules a
        dtype may come first if it is alone: `to("cuda")`, `to(torch.bfloat16)`, `to("cuda", torch.bfloat16)`."""
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise TypeError(f"to() takes a device, a dtype, or a device and then a dtype (got {device}, {dtype})")
            device, dtype = None, device
        for model in self.components.values():
            model.to(device=device)
        saving.change_dtype(self, lambda model: dtype)
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """Arguments of `tqdm` for the bars of long calls: `disable`, `leave`, `desc`, ... A call replaces those before;
        without any, the bars are as they were. Calls that are under way keep theirs."""
        self.progress_bar_config = options


def make_generators(seed: int | None, generator: Generators, count: int) -> Generators:
    """A generator per image, of seed + k; without a seed, `generator`. Raises `ValueError` if both are given, for a
    seed that torch does not take, and for a list of another length."""
    if seed is None:
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(f"got {len(generator)} generators for {count} images; give one, or one per image")
        return generator
    if generator is not None:
        raise ValueError("give seed or generator, not both")
    first = whole_number("seed", seed)
    if not LOWEST_SEED <= first <= LAST_SEED + 1 - count:
        raise ValueError(f"seed: that of each image, seed + k, must be from -2^63 to 2^64 - 1 (got {first})")
    return [torch.Generator().manual_seed(first + k) for k in range(count)]


def count_images(num_images: int | None, labels: Any, per_label: int | None = None) -> tuple[int, Any]:
    """How many images, and the label of each or of all: `num_images`, or one per label, or `per_label` of each label.
    Raises `ValueError` below 1, and for both counts."""
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.tolist()
    several = isinstance(labels, Iterable) and not isinstance(labels, str)
    labels = list(labels) if several else labels
    if per_label is not None:
        if num_images is not None:
            raise ValueError("give num_images (of all) or num_images_per_label (of each label), not both")
        per_label = check_count(per_label, "num_images_per_label")
        labels = [label for label in labels for _ in range(per_label)] if several else labels
        num_images = len(labels) if several else per_label
    if num_images is None:
        num_images = len(labels) if several else 1
    return check_count(num_images), labels
