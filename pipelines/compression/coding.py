"""Images to bytes and back: tokens coded under the prior, and for lossless streams the pixels given the tokens.

`container` defines the file, and `codec` the probabilities for coding symbols. Encoder and decoder evaluate the models
in the same order; batch size and machine may differ, which `codec` allows for. Classes that the encoder chooses are
part of the stream. A lossy stream is decoded from its tokens in float32, so a pixel may differ by one grey level
between processors."""

from __future__ import annotations

import copy
import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO
from zlib import crc32

import numpy as np
import torch
from PIL import ImageOps
from PIL.Image import Image as PILImage
from torch import Tensor

from prior import Prior
from prior.arguments import check_count
from prior.columns import LABEL, describe_columns
from prior.given import Given
from prior.sampling import show_progress
from tokenizer.base import LikelihoodError
from tokenizer.likelihoods import to_values
from tokenizer.precision import finest, in_finest
from tokenizer.spec import ImageSpec

from ..images.formats import FORMATS, OWN_SIZE, ClipWindow, Payload, decode_image, open_image, read_values
from ..images.views import LazyImages, View, check_places, cut, give_places, paste, read_large
from .codec import SymbolCoder, SymbolDecoder, SymbolEncoder, constriction
from .container import Chunk, DamagedStream, Header, ModelMismatch, StreamError, read_stream, write_stream

if TYPE_CHECKING:
    from ..image_pipeline import Condition, ImagePipeline

CODEC = "smalti codec 1"
CHUNK_IMAGES = 256
CHUNK_NUMBERS = 1 << 26  # logits per chunk
MAX_CLASSES = 32  # of a prior for which an encoder without labels tries every class of each image
PIXEL_IMAGES = 16  # images whose pixels are evaluated at once


# Images


def read_exact(payload: Payload, spec: ImageSpec, lossless: bool, formats: tuple[str, ...] = FORMATS) -> Tensor:
    """Read an encoded image, or a window of a clip, uint8 `spec.shape`; see `exact_pixels`. Raises `ValueError`, and
    whatever Pillow raises for damaged files."""
    if isinstance(payload, ClipWindow):
        return torch.stack([read_frame(payload, k, spec.frame, lossless) for k in range(payload.frames)])
    if isinstance(payload, np.ndarray):
        raise ValueError("an array, not a file")
    return exact_pixels(open_image(payload, formats), spec, lossless)


def read_frame(window: ClipWindow, k: int, spec: ImageSpec, lossless: bool) -> Tensor:
    """Read frame k of a window, uint8 `(C, H, W)`. Raises `ValueError`, which names the frame of the clip."""
    try:
        frame = window.read(window.start + k, lossless)
        if not isinstance(frame, np.ndarray):
            return exact_pixels(frame, spec, lossless)
        # Frames of a GIF are grey or coloured, whatever the images of the pipeline are.
        if frame.ndim == 2 and spec.channels == 3:
            frame = np.stack([frame] * 3, -1)
        elif frame.shape[2:] == (3,) and spec.channels == 1 and bool((frame == frame[..., :1]).all()):
            frame = frame[..., 0]
        pixels = read_values(frame, spec)
        require_spec_size(pixels.shape[2], pixels.shape[1], spec)
    except Exception as error:  # as in `read_exact`
        raise ValueError(f"frame {window.start + k}: {error}") from error
    return torch.from_numpy(pixels.copy())


def require_spec_size(width: int, height: int, spec: ImageSpec) -> None:
    if (width, height) != (spec.width, spec.height):
        found = f"{width} x {height}"
        raise ValueError(f"the pipeline's images are {spec.width} x {spec.height} pixels, this one is {found}")


def exact_pixels(image: PILImage, spec: ImageSpec, lossless: bool) -> Tensor:
    """Convert an image, or a frame, that has this size when upright to uint8 `(C, H, W)`. Raises `ValueError` for
    another size and, if lossless, for content that 8 bits per channel cannot represent: another mode, a transparent
    colour, or 16 bits per channel, which Pillow silently reduces to 8."""
    problem = find_inexact(image, spec.mode) if lossless else None
    upright = ImageOps.exif_transpose(image)
    require_spec_size(*upright.size, spec)
    if problem:
        raise ValueError(problem)
    return torch.from_numpy(decode_image(upright, spec).copy())


def find_inexact(image: PILImage, mode: str) -> str | None:
    """Return what 8 bits per channel cannot represent, or None; see `exact_pixels`."""
    halved = any(str(tile[3]).endswith(";16B") for tile in getattr(image, "tile", ()))
    if image.mode != mode and (image.mode, mode) != ("1", "L"):
        return f"lossless compression needs images of mode {mode} here, this one is {image.mode}"
    if halved or "transparency" in image.info:
        what = "16 bits per channel" if halved else "a transparent colour"
        return f"lossless compression needs 8 bits per channel, this image has {what}"
    return None


def whole_image(image: PILImage, spec: ImageSpec, lossless: bool) -> Tensor:
    """Convert an image of any size to uint8 `(C, H, W)`; see `exact_pixels`."""
    if lossless and (problem := find_inexact(image, spec.mode)):
        raise ValueError(problem)
    return torch.from_numpy(decode_image(image, spec.at(image.height, image.width), least=OWN_SIZE).copy())


def check_exact(images: Tensor) -> None:
    """Raise `ValueError` unless all of `images`, float in [-1, 1], are 8-bit values."""
    scaled = (in_finest(images) + 1) * 127.5
    if not bool(((scaled - scaled.round()).abs() < 1e-3).all()):
        raise ValueError("lossless compression needs 8-bit images, but these floats are not multiples of a grey level")


# The models


def has_residual(pipeline: ImagePipeline, lossless: bool) -> bool:
    """Return whether pixels must be coded in addition to tokens. Raises `LikelihoodError` if that is impossible."""
    if not lossless or pipeline.tokenizer.reversible:
        return False
    if not pipeline.tokenizer.has_likelihood:
        raise LikelihoodError(
            f"lossless compression needs a decoder with a likelihood, which this {pipeline.tokenizer.name!r} tokenizer "
            "lacks; lossy compression keeps the tokens"
        )
    return True


def chunk_images(pipeline: ImagePipeline) -> int:
    """Return the number of images per chunk, which is in memory at once."""
    grid = pipeline.prior.grid
    return max(1, min(CHUNK_IMAGES, CHUNK_NUMBERS // (len(grid) * grid.vocab_size)))


def identify_models(pipeline: ImagePipeline) -> bytes:
    """Return 16 bytes that identify the models and the codec."""
    parts = (CODEC, pipeline.tokenizer.fingerprint(), pipeline.prior.fingerprint())
    return hashlib.sha256(" ".join(parts).encode()).digest()[:16]


def identify_given(given: Given) -> bytes:
    """Return 8 bytes that identify what is given, or none if all rows are null: as in 0.3, also rows of several
    numbers one of which is."""
    known = any(not bool(given.columns[name].is_null(rows).all()) for name, rows in given.rows.items())
    return bytes.fromhex(given.digest)[:8] if known else b""


def given_of_stream(given: Given, header: Header, spec: ImageSpec) -> Given:
    """Return what is given of what is coded: of images, or of their tiles, which know their places."""
    if header.sizes is None:
        return given
    view = View.side_by_side(spec)
    tiles = [tile for number, size in enumerate(header.sizes) for tile in view.tiles(number, size)]
    return give_places(check_places(given), tiles)


def choose_classes(prior: Prior, tokens: Tensor, given: Given) -> Tensor | None:
    """Return the class, or the null class, under which the tokens `(n, *grid.shape)` of each image are most likely,
    int64 `(n,)`, given other columns. Return None, for the null class of all images, if storing the classes costs more
    than it saves, or if the prior has no classes or more than `MAX_CLASSES`."""
    null, count = prior.num_classes, len(tokens)
    if not 0 < null <= MAX_CLASSES:
        return None
    tokens = tokens.to(prior.device)
    nats = [prior.log_prob(tokens, tokens.new_full((count,), k), condition=given).double() for k in range(null + 1)]
    best, classes = torch.stack(nats).max(0)
    return classes if (best - nats[null]).sum() > count * math.log(null + 1) else None


class Models:
    """A pipeline's models in float64 (which autocast does not change), which code symbols while they are evaluated.

    residual: whether pixels are coded in addition to tokens. Devices without float64 are replaced by the CPU."""

    def __init__(self, pipeline: ImagePipeline, *, residual: bool) -> None:
        self.device = pipeline.device if finest(pipeline.device) == torch.float64 else torch.device("cpu")
        self.prior = to_double(pipeline.prior, self.device)
        self.tokenizer = to_double(pipeline.tokenizer, self.device) if residual else pipeline.tokenizer
        self.residual = residual

    def code_tokens(self, tokens: Tensor, given: Given, coder: SymbolCoder, batch_size: int) -> None:
        """Code `tokens` (n, *grid.shape) in the prior's order, rank by rank for all images; a decoder fills them in.
        batch_size: images evaluated at a time. What is given is encoded in float64, too, so that its batch does not
        matter."""
        order = self.prior.order.tolist()
        flat, rank = tokens.view(len(tokens), -1), 0
        states = []
        for part in torch.arange(len(flat), device=self.device).split(batch_size):
            states.append(self.prior.start(self.prior.encode_given(given[part])))
        last: Sequence[Tensor | None] = [None] * len(states)
        for size in self.prior.blocks:
            block = order[rank : rank + size]
            parts = [self.prior.next_logits(state, ids) for state, ids in zip(states, last, strict=True)]
            for cell, logits in zip(block, torch.cat(parts).unbind(1), strict=True):
                flat[:, cell] = coder.code(logits, flat[:, cell])
            last, rank = flat[:, block].split(batch_size), rank + size

    def code_classes(self, classes: Tensor, given: Given, coder: SymbolCoder) -> Given:
        """Code `classes` `(n,)`, all and null equally probable; return what is given with these labels."""
        null = self.prior.num_classes
        logits = torch.zeros(len(classes), null + 1, dtype=torch.float64, device=self.device)
        labels = coder.code(logits, classes)
        return given.with_rows(label=torch.where(labels == null, -1, labels))

    def code_pixels(self, pixels: Tensor, tokens: Tensor, coder: SymbolCoder) -> None:
        """Code `pixels` (n, ..., C, H, W) in 0 to 255 channel by channel, given the tokens; a decoder fills them in."""
        for channel in range(pixels.shape[-3]):
            for some, values in zip(tokens.split(PIXEL_IMAGES), pixels.split(PIXEL_IMAGES), strict=True):
                logs, own = self.tokenizer.value_log_probs(some, values, channel).double(), values.select(-3, channel)
                found = coder.code(logs.movedim(-3, -1).flatten(0, -2), own.clone().flatten())
                own.copy_(found.view_as(own))

    @torch.inference_mode()
    def encode(self, tokens: Tensor, given: Given, pixels: Tensor | None, classes: Tensor | None = None) -> Chunk:
        """Encode tokens `(n, *grid.shape)`, pixels `(n, ..., C, H, W)` in 0 to 255, and `classes` `(n,)` to a chunk."""
        tokens, of_tokens, of_pixels = tokens.to(self.device).contiguous(), SymbolEncoder(), SymbolEncoder()
        if classes is not None:
            given = self.code_classes(classes.to(self.device), given, of_tokens)
        self.code_tokens(tokens, given, of_tokens, len(tokens))
        if pixels is not None:
            self.code_pixels(pixels.to(self.device), tokens, of_pixels)
        unsure = torch.cat(of_tokens.unsure + of_pixels.unsure)
        exceptions = unsure.nonzero().flatten().cpu().numpy().astype(np.uint32)
        checksum = checksum_of(tokens, pixels)
        return Chunk(exceptions, of_tokens.bytes(), of_pixels.bytes(), checksum, classes is not None)

    @torch.inference_mode()
    def decode(self, chunk: Chunk, count: int, given: Given, batch_size: int | None) -> tuple[Tensor, Tensor | None]:
        """Decode a chunk of `count` images. Raises `ModelMismatch` for other probabilities on this machine."""
        if chunk.classes and (LABEL in given.rows or not self.prior.num_classes):
            why = "labels, too, were given to compress" if LABEL in given.rows else "this pipeline has none"
            raise DamagedStream(f"the stream is damaged: it has classes, but {why}")
        tokens = torch.zeros(count, *self.prior.grid.shape, dtype=torch.long, device=self.device)
        shape = (count, *self.tokenizer.spec.shape)
        pixels = torch.zeros(shape, dtype=torch.long, device=self.device) if self.residual else None
        first = tokens.numel() + count * chunk.classes  # symbols before those of pixels
        symbols = first + (0 if pixels is None else pixels.numel())
        if len(chunk.exceptions) and chunk.exceptions.max() >= symbols:
            raise DamagedStream("the stream is damaged: an exception is outside its chunk")
        unsure = torch.zeros(symbols, dtype=torch.bool)
        unsure[torch.from_numpy(chunk.exceptions.astype(np.int64))] = True
        unsure = unsure.to(self.device)
        decoder = SymbolDecoder(chunk.tokens, unsure[:first])
        if chunk.classes:
            given = self.code_classes(tokens.new_zeros(count), given, decoder)
        self.code_tokens(tokens, given, decoder, batch_size or count)
        decoder.finish()
        if pixels is not None:
            decoder = SymbolDecoder(chunk.pixels, unsure[first:])
            self.code_pixels(pixels, tokens, decoder)
            decoder.finish()
        if checksum_of(tokens, pixels) != chunk.digest:
            raise ModelMismatch(
                "the stream decodes to different tokens here: this machine computes different probabilities"
            )
        return tokens, pixels


def to_double(model: Any, device: torch.device) -> Any:
    """Return a copy of the model in float64, in eval mode."""
    return copy.deepcopy(model).to(device).double().eval()


def checksum_of(tokens: Tensor, pixels: Tensor | None) -> int:
    content = tokens.cpu().numpy().astype("<u4").tobytes()
    if pixels is not None:  # channels before frames
        content += pixels.movedim(-3, 1).cpu().numpy().astype(np.uint8).tobytes()
    return crc32(content)


def restored_suffix(pipeline: ImagePipeline, lossless: bool) -> str:
    """Return the suffix of a file with a decompressed image or clip. lossless: as in the header; streams of reversible
    tokenizers are exact in any case."""
    spec = pipeline.spec
    return spec.exact_suffix if lossless or pipeline.tokenizer.reversible else spec.shown_suffix


# Streams


def compress(pipeline: ImagePipeline, images: Tensor, *, condition: Condition = None, **options: Any) -> bytes:
    """Compress `images`, float `(B, *spec.shape)` in [-1, 1], to a stream. options: as in `write_images`."""
    file, parts = io.BytesIO(), images.split(chunk_images(pipeline))
    given, chooses = pipeline.read_given(None, condition, len(images), limit=False), has_no_label(condition)
    write_images(pipeline, file, parts, given, chooses_classes=chooses, **options)
    return file.getvalue()


def has_no_label(condition: Condition) -> bool:
    """Return whether a condition says nothing of the label, not even that it is null."""
    names = condition.rows if isinstance(condition, Given) else condition if isinstance(condition, Mapping) else ()
    return LABEL not in names


def write_images(
    pipeline: ImagePipeline,
    file: BinaryIO,
    parts: Iterable[Tensor],
    given: Given,
    *,
    chooses_classes: bool = False,
    lossless: bool = False,
    rate: float = 0.0,
    names: Sequence[str] = (),
    sizes: Sequence[tuple[int, int]] | None = None,
    progress: bool = True,
) -> int:
    """Write a stream of images in `parts` of `chunk_images`; return its size in bytes.

    sizes: (height, width) of each image; `parts` then contain the tiles of all images. given: without the same the
    stream cannot be decoded. chooses_classes: without a label, store the best class of each image, if that shortens the
    stream (see `choose_classes`). lossless: decoding returns the exact 8-bit images instead of reconstructions. rate:
    as in `ImagePipeline.encode`. Raises `LikelihoodError` if lossless is impossible, and `StreamError` if the
    coder is not installed or a name is not a valid file name."""
    constriction()
    models = Models(pipeline, residual=has_residual(pipeline, lossless))
    spec = pipeline.spec
    shape = spec.channels, spec.frames * spec.height, spec.width  # the frames of a clip below one another
    facts = identify_models(pipeline), shape, len(given), chunk_images(pipeline), models.residual
    header = Header(*facts, tuple(names), identify_given(given), None if sizes is None else tuple(sizes))
    coded = given_of_stream(given, header, spec)

    def chunks() -> Iterator[Chunk]:
        for index, part in zip(iterate_chunks(header, progress), parts, strict=False):
            if lossless:
                check_exact(part)
            pixels = to_values(part) if models.residual else None
            own = coded[index * header.chunk_images :][: len(part)].to(models.device)
            tokens = pipeline.encode_batch(part if lossless else pipeline.binarize(part), own, rate=rate)
            with torch.inference_mode():
                classes = choose_classes(pipeline.prior, tokens, own) if chooses_classes else None
            yield models.encode(tokens, own, pixels, classes)

    return write_stream(file, header, chunks())


def write_tiles(
    pipeline: ImagePipeline,
    file: BinaryIO,
    images: LazyImages,
    sizes: Sequence[tuple[int, int]],
    given: Given,
    **options: Any,
) -> int:
    """Write a stream of images by tiles side by side; return its size. sizes: from `sizes_of`."""
    view = View.side_by_side(pipeline.spec)
    images = images if options.get("lossless") else pipeline.list_images(images)
    parts = (tiles.to(pipeline.device) for tiles, _ in cut(images, view, chunk_images(pipeline)))
    return write_images(pipeline, file, parts, given, sizes=sizes, **options)


def sizes_of(images: LazyImages, view: View) -> list[tuple[int, int]]:
    """Return (height, width) of each image. Raises `ValueError` for one that is smaller than a tile."""
    found = [read_large(images, number, view).shape for number in range(len(images))]
    return [(height, width) for *_, height, width in found]


def decode_stream(
    pipeline: ImagePipeline,
    data: bytes,
    *,
    condition: Condition = None,
    batch_size: int | None = None,
    max_images: int | None = None,
    progress: bool = True,
) -> tuple[Header, Iterator[Tensor]]:
    """Return the header of a stream, and an iterator over the images of each chunk, float `(n, *spec.shape)` in [-1,
    1], or over single images of any size if they were cut into tiles. Raises `StreamError` if the stream is damaged,
    from another pipeline, made with another `condition` or has more than `max_images`, or, while iterating, if this
    machine computes different probabilities."""
    header, chunks = read_stream(data)
    if header.pipeline != identify_models(pipeline):
        theirs = "x".join(map(str, header.image))
        raise ModelMismatch(f"the stream was made by another pipeline, for images of {theirs}")
    most = chunk_images(pipeline)
    if min(header.num_coded, header.chunk_images) > most:  # the prior's state for a whole chunk is in memory at once
        raise StreamError(f"the stream has {header.chunk_images} images per chunk; this pipeline allows {most}")
    if header.sizes is not None and header.image != pipeline.spec.shape:
        raise DamagedStream("the stream is damaged: its tiles have another size than the pipeline's images")
    if header.lossless and not pipeline.tokenizer.has_likelihood:
        raise DamagedStream("the stream is damaged: this pipeline has no likelihood of pixels")
    if max_images is not None and header.images > max_images:
        raise StreamError(f"the stream has {header.images} images, the limit is {max_images}")
    # Numbers are as they are given, which streams of 0.3 need, too.
    given = pipeline.read_given(None, condition, header.images, limit=False)
    digest = identify_given(given)
    if digest and not header.condition:
        raise StreamError("the stream was made without a condition: decompress it without one")
    if digest != header.condition:
        other = "another condition" if digest else "a condition"
        raise StreamError(
            f"the stream was made with {other}: give condition=, the values with which its {header.images} images were "
            f"compressed, in their order ({describe_columns(pipeline.columns)})"
        )
    constriction()
    models = Models(pipeline, residual=header.lossless)
    coded = given_of_stream(given, header, pipeline.spec)

    def images() -> Iterator[Tensor]:
        for index in iterate_chunks(header, progress):
            count = min(header.chunk_images, header.num_coded - index * header.chunk_images)
            own = coded[index * header.chunk_images :][:count].to(models.device)
            tokens, pixels = models.decode(chunks[index], count, own, batch_size)
            if pixels is None:
                yield pipeline.decode_batch(tokens)
            else:
                yield pixels.to(pipeline.device).float() / 127.5 - 1

    if header.sizes is None:
        return header, images()
    return header, (image[None] for image in paste(images(), header.sizes, View.side_by_side(pipeline.spec), "last"))


def decompress(
    pipeline: ImagePipeline, data: bytes, *, batch_size: int | None = None, **options: Any
) -> Tensor | list[Tensor]:
    """Decompress all images of a stream, float `(B, *spec.shape)` in [-1, 1]; or, if it consists of tiles, a list of
    images `(1, C, H, W)` of any size. options, errors: as in `decode_stream`; also `ValueError` for a batch size below
    1."""
    if batch_size is not None:
        check_count(batch_size, "batch_size")
    header, parts = decode_stream(pipeline, data, batch_size=batch_size, **options)
    if header.sizes is not None:
        return list(parts)
    return torch.cat([torch.empty(0, *pipeline.spec.shape, device=pipeline.device), *parts])


def iterate_chunks(header: Header, progress: bool) -> Iterable[int]:
    """Iterate over chunk numbers. progress: show a bar if there are several."""
    return show_progress(range(header.num_chunks), progress and header.num_chunks > 1, unit="chunk")
