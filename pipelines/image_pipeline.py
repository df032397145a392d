"""`ImagePipeline`: a tokenizer and a prior that together sample, complete and score images."""

from __future__ import annotations

import copy
import inspect
import io
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
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
from prior.arguments import check_count, to_tensor, whole_number
from prior.canvas import Canvas
from prior.columns import LABEL, ClassColumn, Column, describe_columns
from prior.given import Given
from prior.noise import Generators
from prior.options import GUIDANCE_FIELDS, DecodingOptions, Order, SamplingOptions, select_order
from prior.orders import LAST_SEED
from prior.sampling import SamplingStep, show_progress
from tokenizer import Tokenizer
from tokenizer.base import LikelihoodError
from tokenizer.files import ConfigError, read_folder
from tokenizer.model import Dtype, PretrainedModel, choose_dtype
from tokenizer.spec import ImageSpec, channels_last, check_output_type, select_shown

from . import canvas, completion, representation, saving
from .anomaly import calibrating, healing, maps, scores
from .anomaly.calibration import Calibration
from .columns import format_of
from .compression.coding import compress, decompress, exact_pixels, has_no_label, sizes_of, whole_image, write_tiles
from .frequencies import Frequencies
from .images.binarize import Binarize, binarize
from .images.grids import class_grid
from .images.origin import shareable
from .images.pictures import LATENT, find_user_stacklevel, to_images
from .images.views import LazyImages, View, decode_tiles, encode_tiles, list_images, reconstruct_tiles
from .inference.evidence import evidence_map
from .inference.infer import infer
from .inference.scales import Inference, calibrate_column
from .processes.group import ALONE, ProcessGroup
from .provenance import trained_data
from .rate import check_rate, encode_at_rate

Images = PILImage | Tensor | np.ndarray | Sequence[PILImage | Tensor | np.ndarray | Sequence[PILImage]]
Label = int | str | None
Condition = Mapping[str, Any] | Given | PILImage | Tensor | np.ndarray | list[Any] | tuple[Any, ...] | None
"""Values by column, one for all images or one per image, or the `Given` of `read_given`; or images or tokens for the
only grid."""
Callback = Callable[[Any, int, int, dict[str, Tensor]], Any]
"""`callback_on_step_end`; see `ImagePipeline.__call__`."""

NO_TEXT = "there are no prompts; choose classes with labels=..., and give text with condition=... to a column of text"

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
P = TypeVar("P", bound="ImagePipeline")


class OutputFields(NamedTuple):
    images: Any
    """A list of PIL images, uint8 (B, H, W, C), or float `(B, C, H, W)`. Draws, and the frames of clips, are further
    axes, in this order, after the first."""
    tokens: Tensor
    """`(B, *grid.shape)`."""
    class_names: list[str] | None = None
    """The class of each image, "" for the null class; None if no image has a class."""


class PipelineOutput(OutputFields):
    """The result of a call; `images, tokens, class_names = pipe(4)` unpacks it. spec: what the images are."""

    spec: ImageSpec | None = None
    canvas: Canvas | None = None
    """With `size`, the tokens and the chain that drew them, for `canvas_log_prob` and `decode_canvas`."""

    @classmethod
    def of(
        cls,
        images: Any,
        tokens: Tensor,
        class_names: list[str] | None,
        spec: ImageSpec | None,
        canvas: Canvas | None = None,
    ) -> PipelineOutput:
        found = cls(images, tokens, class_names)
        found.spec, found.canvas = spec, canvas
        return found

    def __repr__(self) -> str:
        is_list = isinstance(self.images, list)
        images = f"list of {len(self.images)}" if is_list else f"{tuple(self.images.shape)} {self.images.dtype}"
        names = None if self.class_names is None else f"list of {len(self.class_names)}"
        return f"{type(self).__name__}(images: {images}, tokens: {tuple(self.tokens.shape)}, class_names: {names})"

    def grid(self, columns: int | None = None, *, labels: bool = True, show: Sequence[int] | None = None) -> PILImage:
        """Return all images in one picture, one column per class with its name on top. With `columns`, images keep
        their order, each below its class name. labels: False omits the names. show: three channels of "pt" images to
        show, by default those of the pipeline. The completions (`draws`) of an image form a row; the frames of a clip
        lie below one another. Small images are enlarged by an integer factor until a name fits above them. Raises
        `ValueError` for the output of `output_type="latent"`, which has no images."""
        if columns is not None and columns < 1:
            raise ValueError(f"columns must be at least 1 (got {columns})")
        if self.images is self.tokens:
            raise ValueError("grid: the output has no images; decode its tokens with pipe.decode(out.tokens)")
        images, spec = self.images, self.spec
        axes = 3 if spec is None else len(spec.shape)
        if isinstance(images, Tensor):
            pixels = channels_last(select_shown(images, show) if show or not spec else spec.select_shown(images))
        else:
            pixels = stack_pictures(images) if isinstance(images, list) else images
        if pixels.dtype != np.uint8 or pixels.shape[-1] not in (1, 3, 4):
            raise ValueError(f'grid: shows images of output_type="pil" or "pt" (got arrays of {pixels.dtype})')
        draws = pixels.shape[1] if pixels.ndim > 1 + axes else None
        names = self.class_names if draws is None else None
        pixels = pixels.reshape(-1, *pixels.shape[-axes:])
        return Image.fromarray(class_grid(pixels, names, columns or draws, captions=labels))


def stack_pictures(images: Any) -> np.ndarray:
    """Return nested lists of PIL images as an array (..., H, W, C)."""
    if isinstance(images, list):
        return np.stack([stack_pictures(image) for image in images])
    return np.atleast_3d(np.asarray(images))


def serialized(method: F) -> F:
    """Run a method without gradients, holding the pipeline's lock: reentrant, as a callback may call the pipeline."""

    @wraps(method)
    def call(pipeline: ImagePipeline, *args: Any, **kwargs: Any) -> Any:
        with pipeline._lock, torch.no_grad():
            return method(pipeline, *args, **kwargs)

    return cast(F, call)


class ImagePipeline:
    """A tokenizer and a prior over its tokens, saved and loaded as one folder.

    labels: class names in the order of their ids. sampler: default sampling settings, as declared by the prior's
    `Sampling`. condition_tokenizers: the tokenizers of the prior's grid columns by name, by default the pipeline's own
    for columns that were encoded with it. Raises `IntegrityError` if the prior was trained with other tokenizers,
    `ConfigError` for labels or settings that do not fit the prior.

    `calibration`, `provenance`, `frequencies` (how often classes occur in the training split) and `sample_grid`
    describe the current models and are reset when a model is replaced, as in `pipe.prior = other`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prior: Prior,
        background: Prior | None = None,
        *,
        labels: Sequence[str] = (),
        sampler: dict[str, Any] | None = None,
        condition_tokenizers: Mapping[str, Tokenizer] | None = None,
    ) -> None:
        tokenizers = saving.check_fit(tokenizer, prior, background, condition_tokenizers)
        if labels and len(labels) != prior.num_classes:
            raise ConfigError(f"{saving.INDEX}: labels: {len(labels)} names for {prior.num_classes} classes")
        self.tokenizer, self.prior = tokenizer.eval(), prior.eval()
        self.background = None if background is None else background.eval()  # see `set_background`
        self.condition_tokenizers = {name: one.eval() for name, one in tokenizers.items()}
        self.labels = list(labels)
        saving.check_texts(self.columns)
        self.sampler = saving.make_sampler(prior, sampler or {})
        self.provenance: dict[str, Any] = {}
        self.frequencies = Frequencies()
        self.inference = Inference()
        self.sample_grid: np.ndarray | None = None
        self.calibration: Calibration | None = None
        self.measured_distance: float | None = None
        self.progress_bar_config: dict[str, Any] = {}
        self._lock = threading.RLock()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in saving.PARTS and getattr(self, name, value) is not value:
            self.calibration = None
            if name != saving.BACKGROUND:  # the background prior generates no images
                self.provenance, self.frequencies, self.sample_grid = {}, Frequencies(), None
                self.measured_distance, self.inference = None, Inference()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_lock"}  # a copy needs its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def __repr__(self) -> str:
        grid, shape = self.prior.grid, f"{self.spec.noun}s {'x'.join(map(str, self.spec.shape))}"
        others = self.prior.config.conditions
        tokens, columns = "x".join(map(str, grid.shape)), ", columns " * bool(others) + ", ".join(others)
        known = f"tokens {tokens} of {grid.vocab_size}, {self.prior.num_classes} classes{columns}"
        return f"{type(self).__name__}({self.tokenizer.name} + {self.prior.name}, {shape}, {known})"

    # Sampling

    @serialized
    def __call__(
        self,
        num_images: int | None = None,
        labels: Label | Sequence[Label] = None,
        *,
        condition: Condition = None,
        num_images_per_label: int | None = None,
        seed: int | None = None,
        generator: Generators = None,
        size: Sequence[int] | None = None,
        stride: int | None = None,
        wrap: canvas.Wrap = False,
        tokens: Tensor | None = None,
        known: Tensor | None = None,
        order: Order = None,
        num_orders: int = 1,
        cache: bool = True,
        parallel: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 64,
        output_type: str = "pil",
        progress: bool = True,
        callback_on_step_end: Callback | None = None,
        **settings: Any,
    ) -> PipelineOutput:
        """Sample images.

        labels: one class (id or name) for all, or one per image; None is unconditional. condition: values of `columns`
        by name, one for all images or one per image, such as `{"age": 63}`; see `read_given`. num_images: by default,
        as many as labels or values are given, else 1. num_images_per_label: instead of `num_images`, the number of
        images of each label in turn. seed: image k uses seed + k, for any `batch_size`. tokens, known, order,
        num_orders, cache, parallel: as in `Prior.sample`. output_type: "pil", "np" (uint8, or the type and range of the
        training images), "pt" (float in [-1, 1]), or "latent" (the tokens, not decoded). Clips (`frames` > 1) are lists
        of lists of PIL images, arrays (B, T, H, W, C) or tensors `(B, T, C, H, W)`. progress: False hides the bar.

        size: (H, W) in pixels of images larger than the model's, for priors that condition on any known tokens: a
        window slides over a canvas and continues the tokens that are there (`out.canvas`; see `prior.canvas`). stride:
        pixels from one window to the next; None: half a window. wrap: True, "x" or "y" joins opposite borders. A value
        of the condition may then be an array with one for each window, (count, rows, columns, ...), and a grid takes
        images that lie over the canvas. Windows that do not overlap are drawn at once, `batch_size` at a time.

        temperature: below 1 prefers likely ids; 0 takes the likeliest. top_k: sample from the k likeliest ids only.
        top_p: sample from the likeliest ids with this total probability only. guidance_scale: above 1 follows labels
        and condition more closely, 1 is no guidance. None, as for settings that are left out, is the pipeline's own
        (`pipeline.sampler`). settings: the others that the prior's `Sampling` declares (`guidance_end`,
        `guidance_power`, `guidance_on`; also `steps`, `confidence_temperature` and `schedule` for a masked-token
        prior). The pipeline's own `steps` are ignored if `order`, `num_orders`, `cache` or `parallel` is given, since
        they cannot be combined. The guidance schedule is replaced as a whole: a given `guidance_scale` is constant
        unless `guidance_end` is also given, and a given `guidance_end` is linear unless `guidance_power` is also given.

        callback_on_step_end: called as `f(pipe, step, rank, {"tokens": ..., "known": ...})` after each step: step
        counts from 0 over all batches; rank is the position that the current images have reached in their order; tokens
        `(B, *grid.shape)` holds the tokens of all images so far (0 if not yet drawn) and known says which are drawn.
        Both are copies. Its return value is ignored; an exception ends the call.

        Raises `ValueError` for arguments out of range, `TypeError` for a setting that the prior does not have."""
        if isinstance(num_images, str):
            raise TypeError(f"num_images should be a number (got {num_images!r}); {NO_TEXT}")
        if num_images_per_label is not None:
            if num_images is not None:
                raise ValueError("give num_images (in total) or num_images_per_label, not both")
            labels, condition, num_images = repeat_labels(labels, condition, num_images_per_label)
        num_images = None if num_images is None else check_count(num_images)
        check_output_type(output_type, LATENT)
        if size is None and (stride is not None or wrap is not False):
            raise ValueError("stride and wrap are those of a canvas; give its size, too")
        chain = None if size is None else canvas.make_chain(self, size, stride, wrap, order)
        if chain is None:
            given = self.read_given(labels, condition, num_images)
        else:
            given = canvas.read_canvas_given(self, chain, labels, condition, num_images)
        num_images = check_count(len(given) if chain is None else len(given) // len(chain.corners))

        def report(step: SamplingStep) -> None:
            assert callback_on_step_end is not None
            callback_on_step_end(self, step.number, step.rank, {"tokens": step.tokens, "known": step.known})

        decoding = DecodingOptions(order, num_orders, cache, parallel)
        shared = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
        sampling = self.resolve_sampling({**shared, **settings}, given.names, decoding)
        request: Any = {
            "sampling": sampling,
            "decoding": decoding,
            "generator": make_generators(seed, generator, num_images),
            "tokens": tokens,
            "known": known,
            "batch_size": batch_size,
            "progress": self.progress_bar_config if progress else False,
            "on_step": None if callback_on_step_end is None else report,
        }
        if chain is not None:
            drawn = canvas.sample_canvas(self, chain, given, **request)
            images = drawn.tokens if output_type == LATENT else self.decode_canvas(drawn, output_type=output_type)
            return PipelineOutput.of(images, drawn.tokens, None, self.spec, drawn)
        tokens = self.prior.sample(num_images, condition=given, **request)
        options: Any = {"output_type": output_type, "batch_size": batch_size, "progress": progress}
        images = tokens if output_type == LATENT else self.decode(tokens, **options)
        names = self.class_names(given.rows[LABEL]) if LABEL in given.rows else None
        return PipelineOutput.of(images, tokens, names, self.spec)

    def resolve_sampling(
        self, settings: Mapping[str, Any], given: Collection[str], decoding: DecodingOptions
    ) -> SamplingOptions:
        """Return these settings, with the pipeline's own in place of those that are missing, and of None for a setting
        that all priors share. given: the names of the columns that are given. Raises `TypeError` for a setting that the
        prior does not have, `ValueError` for values out of range."""
        known, shared = self.prior.Sampling.names(), SamplingOptions.names()
        chosen = {name: value for name, value in settings.items() if value is not None or name not in shared}
        if unknown := [name for name in chosen if name not in known]:
            others = inspect.signature(self.__call__).parameters.keys() - unknown
            near = get_close_matches(unknown[0], [*known, *others], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"a {self.prior.name!r} prior takes {', '.join(known)}"
            raise TypeError(f"unexpected argument {unknown[0]!r}; {NO_TEXT if 'prompt' in unknown[0] else hint}")
        own = self.sampler if decoding.is_default else self.sampler.for_given_order()
        if not own.can_guide(given):
            own = own.unguided()  # there is nothing to guide towards
        defaults = dict(vars(own))
        for number, name in enumerate(GUIDANCE_FIELDS, 1):
            if name in chosen:  # the rest of the pipeline's guidance schedule does not apply
                defaults.update(dict.fromkeys(GUIDANCE_FIELDS[number:]))
        return self.prior.make_sampling_options(**{**defaults, **chosen})

    complete = serialized(completion.complete)

    # Between images and tokens

    @serialized
    def encode(
        self,
        images: Images,
        labels: Label | Sequence[Label] = None,
        *,
        condition: Condition = None,
        rate: float = 0.0,
        batch_size: int = 256,
    ) -> Tensor:
        """Encode images to tokens `(B, *grid.shape)`.

        images: PIL images, or uint8 or float in [-1, 1] as tensors `(B, C, H, W)`, arrays `(B, H, W, C)` or `(H, W,
        C)`, or a list of single images. If the pipeline takes clips (`frames` > 1): tensors `(B, T, C, H, W)` or `(T,
        C, H, W)`, arrays `(B, T, H, W, C)` or `(T, H, W, C)`, lists of lists of T PIL images, or a list of single
        clips.

        rate: above 0, choose ids that cost the prior fewer bits, given labels and condition, where their codes are not
        much farther: by |z - e|^2 + rate * s * -ln p(id | earlier ids), with s the `code_distance`. Raises
        `ValueError` if the prior has no order, the tokenizer no nearest codes, or s is not known."""
        batch = self.to_images(images)
        given = self.read_given(labels, condition, len(batch)) if rate else None
        return self.encode_batch(batch, given, rate=rate, batch_size=batch_size)

    @serialized
    def encode_batch(
        self, batch: Tensor, given: Given | None = None, *, rate: float = 0.0, batch_size: int = 256
    ) -> Tensor:
        """Like `encode`, for float images `(B, *spec.shape)` in [-1, 1], as returned by `to_images`."""
        check_rate(self, rate)
        parts = batch.to(self.device, self.dtype).split(check_count(batch_size, "batch_size"))
        if not rate or not len(batch):
            return torch.cat([self.tokenizer.encode(part) for part in self.with_bar(parts, "encoding")])
        rows = (given or self.read_given(count=len(batch))).to(self.device)
        givens = [rows[start : start + batch_size] for start in range(0, len(batch), batch_size)]
        every = self.with_bar(list(zip(parts, givens, strict=True)), "encoding")
        return torch.cat([encode_at_rate(self, part, own, rate) for part, own in every])

    @property
    def code_distance(self) -> float | None:
        """The mean squared distance of vectors to their nearest codes: that of a tokenizer trained with a rate, or what
        `measure_code_distance` found; None if it is not known."""
        price = getattr(getattr(self.tokenizer, "quantizer", None), "price", None)
        return float(price.distance) or None if price is not None else self.measured_distance

    @serialized
    def measure_code_distance(self, images: Images, *, batch_size: int = 256) -> float | None:
        """Measure `code_distance` on images that were not trained on, unless training did; `save_pretrained` saves
        it. None if the tokenizer has no nearest codes."""
        quantizer: Any = getattr(self.tokenizer, "quantizer", None)
        if quantizer is not None and quantizer.searches_codes and quantizer.price is None:
            parts = self.to_images(images).to(self.dtype).split(check_count(batch_size, "batch_size"))
            errors = [quantizer.errors(cast(Any, self.tokenizer).embed(part)).double().cpu() for part in parts]
            self.measured_distance = float(torch.cat([error.flatten() for error in errors]).mean())
        return self.code_distance

    @serialized
    def decode(self, tokens: Any, *, output_type: str = "pil", batch_size: int = 256, progress: bool = True) -> Any:
        """Decode `tokens` `(B, *grid.shape)`, a tensor, an array or lists, to images; or only the first k tokens,
        `(B, k)`, if the tokenizer can decode prefixes (`titok` with `keep`). Raises `ValueError` for ids out of
        range."""
        images = self.decode_batch(to_tensor(tokens, self.device), batch_size=batch_size, progress=progress)
        return self.convert_images(images, output_type)

    @serialized
    def decode_batch(self, tokens: Tensor, *, batch_size: int = 256, progress: bool = True) -> Tensor:
        """Like `decode`, but return float images `(B, *spec.shape)` in [-1, 1]."""
        parts = tokens.split(check_count(batch_size, "batch_size"))
        batches = self.with_bar(parts, "decoding") if progress else parts
        return torch.cat([self.tokenizer.decode(part) for part in batches])

    encode_tiles = serialized(encode_tiles)
    decode_tiles = serialized(decode_tiles)
    encode_canvas = serialized(canvas.encode_canvas)
    decode_canvas = serialized(canvas.decode_canvas)

    @serialized
    def reconstruct(
        self, images: Images, *, stride: int | None = None, output_type: str = "pil", batch_size: int = 256
    ) -> Any:
        """Return `decode(encode(images))`.

        stride: take images of any size, as `encode_tiles` does, and return a list of images at their own sizes.
        Overlapping tiles are blended linearly, so that there are no seams; with a stride of a whole tile, only the last
        ones of a row and of a column overlap, and there are seams."""
        if stride is not None:
            return reconstruct_tiles(self, images, View.of(self.spec, stride), output_type, batch_size)
        tokens = self.encode(images, batch_size=batch_size)
        return self.decode(tokens, output_type=output_type, batch_size=batch_size)

    def to_images(self, images: Images) -> Tensor:
        """Convert images in any form that `encode` accepts to float `(B, C, H, W)`, of clips `(B, T, C, H, W)`, in
        [-1, 1] on the pipeline's device, black and white if the pipeline was trained on such (`binarize`). Warns once
        about floats that look like [0, 1]."""
        return self.binarize(to_images(images, self.spec)).to(self.device)

    def list_images(self, images: Any) -> LazyImages:
        """Return images of any size, loaded on access, each as `to_images` returns it; see `views.list_images`."""
        found = list_images(images, self.spec)
        return replace(found, read=lambda k: self.binarize(found.read(k)[None])[0])

    def binarize(self, images: Tensor) -> Tensor:
        """Make images `(B, C, H, W)`, uint8 or float in [-1, 1], black and white if the pipeline was trained on such
        (`data.binarize`). Draws are seeded by the sha256 of an image's pixels, so that it always becomes the same."""
        return images if self.binarized is None else binarize(images, self.binarized)

    @property
    def binarized(self) -> Binarize | None:
        """How grey images become black and white; None if they stay grey."""
        data = trained_data(self.provenance)
        return None if data is None else data.binarize

    def convert_images(self, images: Tensor, output_type: str) -> Any:
        """Convert float images `(..., C, H, W)` in [-1, 1] to `output_type`; see `__call__`."""
        return self.spec.from_unit(images, output_type)

    @property
    def spec(self) -> ImageSpec:
        """The size, frames, type and range of images."""
        return self.tokenizer.spec

    @property
    def frames(self) -> int:
        """Number of frames of a clip; 1 for images."""
        return self.spec.frames

    def batches(self, rows: Tensor, given: Given, batch_size: int) -> Iterator[tuple[slice, Tensor, Given]]:
        """Yield the slice, the rows and what is given of each batch; at least one batch, which may be empty."""
        check_count(batch_size, "batch_size")
        for start in self.with_bar(range(0, max(1, len(rows)), batch_size), "scoring"):
            place = slice(start, start + batch_size)
            yield place, rows[place], given[place]

    def with_bar(self, parts: Sequence[T], what: str, unit: str = "batch") -> Iterable[T]:
        """Iterate over `parts`, with a bar after two seconds unless another bar is active."""
        from tqdm import tqdm

        if len(parts) < 2 or len(getattr(tqdm, "_instances", ())):
            return parts
        return show_progress(parts, {"desc": what, "delay": 2.0, **self.progress_bar_config}, unit=unit)

    # Labels and conditions

    @property
    def columns(self) -> dict[str, Column]:
        """The columns that `condition` may give values for, by name: `label` if there are classes, and the others."""
        classes = self.prior.num_classes
        label = {LABEL: ClassColumn.numbered(classes, self.labels)} if classes else {}
        return {**self.prior.columns, **label}

    def read_given(
        self,
        labels: Label | Sequence[Label] = None,
        condition: Condition = None,
        count: int | None = None,
        *,
        default: int = 1,
        limit: bool = True,
        marginal: str | None = None,
    ) -> Given:
        """Read labels and a condition for `count` images (None: as many as there are values, or `default`).

        labels: one class (id or name) for all, or one per image, the short form of `condition["label"]`. condition:
        values by column, one for all images or one per image, as in `Column.parse`. A grid also takes images, in any
        form that `encode` accepts, and a vector of n-grams takes text. Images or tokens alone stand for the only grid.
        Numbers outside those of the training data become the nearest of these, with a warning except for tensors, which
        hold raw values; limit: False leaves them as they are. marginal: a column of classes over which densities become
        mixtures (see `Given.over`), weighted by their frequencies in the training split given the other columns. Raises
        `ValueError`, which names the column and what is allowed."""
        columns = self.columns
        if isinstance(condition, (PILImage, Tensor, np.ndarray, list, tuple)):
            grids = [name for name, column in columns.items() if column.is_map]
            if len(grids) != 1:
                raise ValueError(f"condition: images alone stand for the only grid, but {describe_columns(columns)}")
            condition = {grids[0]: condition}

        def convert(name: str, column: Column, value: Any) -> Any:
            return format_of(name, column, self.condition_tokenizers.get(name)).convert(value)

        given = Given.read(
            columns, labels, condition, count=count, default=default, device=self.device, convert=convert
        ).drop_null()
        if marginal is not None:
            given.over(marginal)  # which raises errors
            given = given.over(marginal, self.frequencies.log_prob(marginal, given))
        if not limit:
            return given
        for name, rows in given.rows.items():
            is_raw = isinstance(condition, Given) or isinstance((condition or {}).get(name), Tensor)
            if not is_raw and (line := columns[name].describe_outside(rows)):
                warnings.warn(f"condition: {name}: {line}", stacklevel=find_user_stacklevel())
        return given.limit()

    def class_names(self, ids: Tensor) -> list[str]:
        """Return the names of class ids `(B,)`, or their numbers if classes have no names; "" for -1, which is null."""
        names = [*(self.labels or map(str, range(self.prior.num_classes))), ""]
        return [names[number] for number in ids.tolist()]

    # Scoring images

    @serialized
    def log_prob(
        self,
        images: Images,
        labels: Label | Sequence[Label] = None,
        *,
        condition: Condition = None,
        order: Order = None,
        num_orders: int = 1,
        num_masks: int = 1,
        marginal: str | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Return log p of each image's tokens under the prior given its label and condition, `(B,)` nats; unconditional
        without them. If `prior.exact` is False, each value is an unbiased estimate of a lower bound.

        condition: see `read_given`. order, num_orders, num_masks: as in `Prior.log_prob`. marginal: a column of
        classes, usually "label", that are not known: log sum_c p(c | condition) p(tokens | c, condition), where p(c) is
        the share of the class in the training split (for files of 0.3, all classes are equally likely). It takes as
        many passes as there are classes. Raises `ValueError` for a column that is no class, that the prior lacks or
        that is given, and for more than 1,024 classes."""
        batch, parts = self.to_images(images), []
        given = self.read_given(labels, condition, len(batch), marginal=marginal)
        for rows, part, own in self.batches(batch, given, batch_size):
            mixture: Any = select_order(order, rows, len(batch)), num_orders, num_masks
            parts.append(self.prior.log_prob(self.encode_batch(part), None, *mixture, condition=own))
        return torch.cat(parts)

    @serialized
    def bits_per_dim(
        self,
        images: Images,
        labels: Label | Sequence[Label] = None,
        *,
        condition: Condition = None,
        order: Order = None,
        num_orders: int = 1,
        marginal: str | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Return bits per dimension (pixel and channel) of each image, `(B,)`: bits of its tokens under the prior plus
        bits of its pixels given the tokens. If `prior.exact` is False, their mean over images is an upper bound. The
        other arguments are those of `log_prob`. Raises `LikelihoodError` if the decoder has no likelihood."""
        batch, parts = self.to_images(images), []
        given = self.read_given(labels, condition, len(batch), marginal=marginal)
        for rows, part, own in self.batches(batch, given, batch_size):
            tokens, chosen = self.encode_batch(part), select_order(order, rows, len(batch))
            pixels = self.tokenizer.pixel_log_prob(part, tokens)
            if pixels is None:
                raise LikelihoodError(
                    f"bits_per_dim needs a decoder with a likelihood, which this {self.tokenizer.name!r} lacks; "
                    "log_prob returns the prior's part"
                )
            parts.append(self.prior.log_prob(tokens, None, chosen, num_orders, condition=own) + pixels)
        return -torch.cat(parts) / (batch.shape[1:].numel() * np.log(2))

    conditional_log_prob = serialized(completion.conditional_log_prob)
    canvas_log_prob = serialized(canvas.canvas_log_prob)

    # Finding anomalies

    calibrate = serialized(calibrating.calibrate)
    anomaly_score = serialized(scores.anomaly_score)
    anomaly_map = serialized(maps.anomaly_map)
    heal = serialized(healing.heal)

    # Inferring columns

    infer = serialized(infer)
    evidence_map = serialized(evidence_map)
    calibrate_column = serialized(calibrate_column)

    # Images as vectors

    embed = serialized(representation.embed)
    nearest = serialized(representation.nearest)

    # Storing images

    @serialized
    def compress(
        self,
        images: Any,
        *,
        condition: Condition = None,
        lossless: bool = False,
        rate: float = 0.0,
        tile: bool = False,
        progress: bool = True,
    ) -> bytes:
        """Compress images to a stream that only this pipeline can decode, to the same tokens on any machine.

        images: PIL images of exactly the pipeline size, uint8 or float `(B, C, H, W)`, or clips (see `encode`); made
        black and white as by `to_images`, except in lossless streams. condition: values of columns and `label`, as in
        `read_given`; they shorten the stream, and `decompress` needs them again. Without `label`, each class of a prior
        of at most 32 is tried, and the stream stores the best one of each image, if that makes it shorter; `{"label":
        None}` skips this, which is faster. lossless: store every pixel; needs a decoder with a likelihood or a `pixels`
        tokenizer. Otherwise only tokens are stored; the images that two machines decode from them may differ by one
        grey level in some pixels, because the decoder rounds its float32 differently. rate: as in `encode`, for a
        shorter stream. tile: take images of any size from the model size on, which are cut into tiles side by side (the
        last ones of a row and of a column are flush with the border), so that decompressed images may show seams unless
        the stream is lossless. Raises `ValueError` for images of another size (lossless: or of more than 8 bits),
        `LikelihoodError` if lossless is not possible, and `StreamError` without the package constriction."""
        several, frame = [images] if isinstance(images, PILImage) else images, self.spec.frame
        options: dict[str, Any] = {"lossless": lossless, "rate": rate, "progress": progress}
        if tile:
            view = View.side_by_side(self.spec)
            if isinstance(several, (list, tuple)) and lossless:
                several = [whole_image(one, frame, True) if isinstance(one, PILImage) else one for one in several]
            whole = list_images(several, self.spec)
            given = self.read_given(None, condition, len(whole), limit=False)
            options["chooses_classes"] = has_no_label(condition)
            write_tiles(self, file := io.BytesIO(), whole, sizes_of(whole, view), given, **options)
            return file.getvalue()

        def exact(one: Any) -> Any:
            if isinstance(one, (list, tuple)):
                return [exact(each) for each in one]
            return exact_pixels(one, frame, lossless) if isinstance(one, PILImage) else one

        pixels = to_images(exact(several), self.spec).to(self.device)
        return compress(self, pixels, condition=condition, **options)

    @serialized
    def decompress(
        self,
        data: bytes,
        *,
        condition: Condition = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        max_images: int | None = None,
        progress: bool = True,
    ) -> Any:
        """Decompress all images of a stream. The tokens equal the compressed ones, and so do the pixels if the stream
        is lossless; otherwise pixels agree to within one grey level (for float32 weights).

        condition: the one given to `compress`; of images for a grid, only the tokens must be the same. batch_size:
        images evaluated at a time, None for a whole chunk; it does not affect the tokens. max_images: refuse streams
        with more images. Of images that were compressed with `tile=True`, return a list at their own sizes. Raises
        `StreamError`, also for another condition: `DamagedStream` if it is damaged, `ModelMismatch` if it was made by
        another pipeline or on a machine that computes other probabilities."""
        check_output_type(output_type)
        options: dict[str, Any] = {"batch_size": batch_size, "max_images": max_images, "progress": progress}
        images = decompress(self, data, condition=condition, **options)
        if isinstance(images, list):
            return [self.convert_images(image, output_type)[0] for image in images]
        return self.convert_images(images, output_type)

    # Saving and loading

    @serialized
    def save_pretrained(
        self, folder: str | Path, *, variant: str | None = None, sample_grid: np.ndarray | None = None
    ) -> None:
        """Write the pipeline folder atomically, replacing an older pipeline there.

        variant: "fp16" or "bf16" rounds the weights of all models to that type (except those that are always float32)
        and stores them in files such as `tokenizer/model.fp16.safetensors`; a folder holds one variant. sample_grid:
        uint8 (H, W, 3), shown on the model card. Raises `PathError` if `folder` holds something else, `LimitError` for
        a grid too large to be loaded again, `ValueError` for weights out of the type's range, `IntegrityError` if a
        model was replaced by one that does not fit the others."""
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
        """Load a pipeline from its folder, its run, a Hub id, or the name of a shipped pipeline (`digits`, `garments`,
        `sprites`).
        Raises a `PipelineLoadError` that names the file, the field, what was found and what is allowed.

        variant: "fp16" or "bf16"; None uses that of the folder. dtype: dtype of the weights in memory; "auto" keeps
        that of the file, None is float32. verify: compare the sha256 of every file with the manifest."""
        folder = saving.find_pipeline(
            source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        pipeline: P = read_folder(folder, lambda: saving.load(cls, folder, variant, verify))
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
        """Upload the pipeline folder with model card and sample grid in one commit, creating the Hub repository if
        needed. revision: the branch. create_pr: open a pull request. variant: as in `save_pretrained`. The commit
        removes files of an earlier pipeline and keeps all others. The path of a local folder of training images is not
        published.

        Returns huggingface_hub's `CommitInfo`. Raises `PushError`, an `OSError`, with the reason in one line."""
        from .hub import push_folder, require_reachable

        require_reachable(repo_id)
        with tempfile.TemporaryDirectory() as temporary:
            folder, shared = Path(temporary) / "pipeline", copy.copy(self)
            shared.provenance = shareable(self.provenance)
            grid = self.sample_picture() if self.sample_grid is None else self.sample_grid
            shared.save_pretrained(folder, variant=variant, sample_grid=grid)
            place: Any = {"token": token, "private": private, "revision": revision, "create_pr": create_pr}
            return push_folder(folder, repo_id, commit_message=commit_message, **place)

    def sample_picture(self, count: int = 80, seed: int = 0, group: ProcessGroup = ALONE) -> np.ndarray:
        """Return a grid of samples with the pipeline's settings, uint8 (H, W, 3), one class per column (at most ten)
        with its name on top; fewer samples of clips, which are taller. The processes of the group share the
        sampling."""
        columns = min(10, self.prior.num_classes) or 10
        count = max(columns, count // self.frames)
        size = -(-count // group.world)

        def draw(start: int) -> Tensor:
            rows = range(start, min(start + size, count))
            labels = [index % columns for index in rows] if self.prior.num_classes else None
            out = self(num_images=len(rows), labels=labels, seed=seed + start, output_type=LATENT, progress=False)
            return self.decode_batch(out.tokens, batch_size=64, progress=False).cpu()

        images = self.spec.picture(torch.cat(group.map(draw, range(0, count, size))))
        names = self.class_names(torch.arange(count) % columns) if self.prior.num_classes else None
        return class_grid(images, names, columns)

    # Models

    @property
    def components(self) -> dict[str, Any]:
        """The models by argument name: `ImagePipeline(**pipe.components, labels=pipe.labels)` is another pipeline."""
        models = {
            "tokenizer": self.tokenizer,
            "prior": self.prior,
            saving.BACKGROUND: self.background,
            "condition_tokenizers": self.condition_tokenizers or None,
        }
        return {name: model for name, model in models.items() if model is not None}

    @property
    def models(self) -> dict[str, PretrainedModel]:
        """All models by their subfolder in the pipeline's folder."""
        models = self.components
        others = models.pop("condition_tokenizers", {})
        own = {name: model for name, model in others.items() if model is not self.tokenizer}
        return {**models, **{f"{saving.CONDITIONS}/{name}": model for name, model in own.items()}}

    def set_background(self, prior: Prior) -> None:
        """Set the prior, trained on perturbed tokens, that `anomaly_score(method="ratio")` compares with. Raises
        `IntegrityError` for a prior over other tokens or classes."""
        saving.check_fit(self.tokenizer, self.prior, prior, self.condition_tokenizers)
        self.background = prior.eval()

    @property
    def device(self) -> torch.device:
        return self.prior.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the tokenizer's weights."""
        return self.tokenizer.dtype

    @serialized
    def to(
        self: P, device: str | int | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> P:
        """Move all models to `device`, convert their weights to `dtype`, and return the pipeline. As in torch, a single
        argument may be a dtype: `to("cuda")`, `to(torch.bfloat16)`, `to("cuda", torch.bfloat16)`."""
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise TypeError(f"to() takes a device, a dtype, or a device and then a dtype (got {device}, {dtype})")
            device, dtype = None, device
        for model in self.models.values():
            model.to(device=device)
        saving.change_dtype(self, lambda model: dtype)
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set arguments of `tqdm` for the bars of long calls: `disable`, `leave`, `desc`, ... They replace earlier
        ones; without arguments the defaults are restored. Running calls are not affected."""
        self.progress_bar_config = options


def make_generators(seed: int | None, generator: Generators, count: int) -> Generators:
    """Return one generator per image, seeded with seed + k, or `generator` if there is no seed. Raises `ValueError` if
    both are given, for a negative or too large seed, and for a list of the wrong length."""
    if seed is None:
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(f"got {len(generator)} generators for {count} images; give one, or one per image")
        return generator
    if generator is not None:
        raise ValueError("give seed or generator, not both")
    first = whole_number("seed", seed)
    if not 0 <= first <= LAST_SEED + 1 - count:
        raise ValueError(f"seed: the seed of each image, seed + k, must be from 0 to 2^64 - 1 (got {first})")
    return [torch.Generator().manual_seed(first + k) for k in range(count)]


def repeat_labels(labels: Any, condition: Any, per_label: int) -> tuple[Any, Any, int]:
    """Return `labels`, or the label in `condition`, `per_label` times in a row, the condition without it, and the
    number of images. Rows with labels that have been read are repeated. Raises `ValueError` for less than 1."""
    per_label = check_count(per_label, "num_images_per_label")
    if isinstance(condition, Given) and LABEL in condition.rows:
        return labels, condition.repeat(per_label), len(condition) * per_label
    if labels is None and isinstance(condition, Mapping):
        condition = dict(condition)
        labels = condition.pop(LABEL, None)
    labels = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels
    if not isinstance(labels, Iterable) or isinstance(labels, str):
        return labels, condition, per_label
    labels = [label for label in labels for _ in range(per_label)]
    return labels, condition, len(labels)
