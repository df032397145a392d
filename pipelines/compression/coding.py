"""Images to bytes and back: tokens coded under the prior, and for lossless streams the pixels given the tokens.

`container` is the file, `codec` makes the numbers that symbols are coded with. Encoder and decoder walk the models in
the same way; a decoder may take other batches, and is on another machine, which `codec` allows for. The images of a
lossy stream are made from its tokens in float32, so a pixel may differ by one grey level between two processors.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO
from zlib import crc32

import numpy as np
import torch
from PIL import ImageOps
from PIL.Image import Image as PILImage
from torch import Tensor

from prior.sampling import check_count, progress_bar
from tokenizer.base import LikelihoodError
from tokenizer.likelihoods import to_values
from tokenizer.precision import finest, in_finest

from ..images.decoding import pixels_of
from .codec import Decoder, Encoder, SymbolCoder, constriction
from .container import Chunk, DamagedStream, Header, ModelMismatch, StreamError, read_stream, write_stream

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline

CODEC = "smalti codec 1"
CHUNK_IMAGES = 256
"""Most images in a chunk."""
CHUNK_NUMBERS = 1 << 26
"""Most logits of a chunk."""
PIXEL_IMAGES = 16
"""Images whose pixels are evaluated at once."""


# Images


def exact_pixels(image: PILImage, shape: tuple[int, int, int], lossless: bool) -> Tensor:
    """uint8 `(C, H, W)` of an image that, upright, has this shape already. Raises `ValueError` for another size and, if
    lossless, for what does not fit into 8 bits a channel: another mode, a colour that is transparent, and 16 bits a
    channel, of which Pillow keeps half (and tells nothing once the image is loaded)."""
    channels, height, width = shape
    modes = ("L", "1") if channels == 1 else ("RGB",)
    halved = any(str(tile[3]).endswith(";16B") for tile in getattr(image, "tile", ()))
    upright = ImageOps.exif_transpose(image)
    if upright.size != (width, height):
        found = f"{upright.width} x {upright.height}"
        raise ValueError(f"the pipeline's images are {width} x {height} pixels, this is {found}")
    if lossless and image.mode not in modes:
        raise ValueError(f"the pipeline keeps images of mode {modes[0]}, this is {image.mode}")
    if lossless and (halved or "transparency" in image.info):
        what = "16 bits a channel" if halved else "a colour that is transparent"
        raise ValueError(f"the pipeline keeps 8 bits a channel, this has {what}")
    return torch.from_numpy(pixels_of(upright, shape).copy())


def check_exact(images: Tensor) -> None:
    """Raise `ValueError` unless all of `images`, float in [-1, 1], are 8-bit values."""
    scaled = (in_finest(images) + 1) * 127.5
    if not bool(((scaled - scaled.round()).abs() < 1e-3).all()):
        raise ValueError("lossless compression takes 8-bit images; these floats are not on the grid of 256 values")


# The models


def has_residual(pipeline: ImagePipeline, lossless: bool) -> bool:
    """Whether pixels have to be coded beside the tokens. Raises `LikelihoodError` where that is impossible."""
    if not lossless or pipeline.tokenizer.reversible:
        return False
    if not pipeline.tokenizer.has_likelihood:
        raise LikelihoodError(
            f"lossless compression needs a decoder with a likelihood, and {pipeline.tokenizer.name!r} as it was made "
            "has none; lossless=False keeps the tokens alone"
        )
    return True


def chunk_images(pipeline: ImagePipeline) -> int:
    """How many images a chunk holds, which is what is in memory at once."""
    grid = pipeline.prior.grid
    return max(1, min(CHUNK_IMAGES, CHUNK_NUMBERS // (len(grid) * grid.vocab_size)))


def identify(pipeline: ImagePipeline) -> bytes:
    """16 bytes that identify the models, and how they are evaluated."""
    parts = (CODEC, pipeline.tokenizer.fingerprint(), pipeline.prior.fingerprint())
    return hashlib.sha256(" ".join(parts).encode()).digest()[:16]


class Models:
    """A pipeline's models in float64, which autocast leaves alone, and their walks, which code symbols on their way.

    The unconditional prior is used. residual: whether pixels are coded beside the tokens. On a device without float64
    the processor is used.
    """

    def __init__(self, pipeline: ImagePipeline, *, residual: bool) -> None:
        self.device = pipeline.device if finest(pipeline.device) == torch.float64 else torch.device("cpu")
        self.prior = doubled(pipeline.prior, self.device)
        self.tokenizer = doubled(pipeline.tokenizer, self.device) if residual else pipeline.tokenizer
        self.residual = residual

    def walk_tokens(self, tokens: Tensor, coder: SymbolCoder, batch_size: int) -> None:
        """Code `tokens` (n, *grid.shape) along the prior's order, each rank's for all images; a decoder fills them in.
        batch_size: images evaluated at a time."""
        order = self.prior.order.tolist()
        flat, rank = tokens.view(len(tokens), -1), 0
        states = [self.prior.start(len(part), None) for part in flat.split(batch_size)]
        last: Sequence[Tensor | None] = [None] * len(states)
        for size in self.prior.blocks:
            block = order[rank : rank + size]
            parts = [self.prior.next_logits(state, ids) for state, ids in zip(states, last, strict=True)]
            for cell, logits in zip(block, torch.cat(parts).unbind(1), strict=True):
                flat[:, cell] = coder.code(logits, flat[:, cell])
            last, rank = flat[:, block].split(batch_size), rank + size

    def walk_pixels(self, pixels: Tensor, tokens: Tensor, coder: SymbolCoder) -> None:
        """Code `pixels` (n, C, H, W) in 0 to 255 channel by channel, given the tokens; a decoder fills them in."""
        for channel in range(pixels.shape[1]):
            for some, values in zip(tokens.split(PIXEL_IMAGES), pixels.split(PIXEL_IMAGES), strict=True):
                logs = self.tokenizer.value_log_probs(some, values, channel).double()
                found = coder.code(logs.movedim(1, -1).flatten(0, 2), values[:, channel].flatten())
                values[:, channel] = found.view_as(values[:, channel])

    @torch.inference_mode()
    def encode(self, tokens: Tensor, pixels: Tensor | None) -> Chunk:
        """A chunk of tokens `(n, *grid.shape)`, and of pixels `(n, C, H, W)` in 0 to 255."""
        tokens, of_tokens, of_pixels = tokens.to(self.device).contiguous(), Encoder(), Encoder()
        self.walk_tokens(tokens, of_tokens, len(tokens))
        if pixels is not None:
            self.walk_pixels(pixels.to(self.device), tokens, of_pixels)
        doubts = torch.cat(of_tokens.doubts + of_pixels.doubts)
        exceptions = doubts.nonzero().flatten().cpu().numpy().astype(np.uint32)
        return Chunk(exceptions, of_tokens.bytes(), of_pixels.bytes(), digest_of(tokens, pixels))

    @torch.inference_mode()
    def decode(self, chunk: Chunk, count: int, batch_size: int | None) -> tuple[Tensor, Tensor | None]:
        """The tokens and the pixels of a chunk of `count` images. Raises `ModelMismatch` where this machine computes
        other probabilities."""
        tokens = torch.zeros(count, *self.prior.grid.shape, dtype=torch.long, device=self.device)
        shape = (count, *self.tokenizer.image_shape)
        pixels = torch.zeros(shape, dtype=torch.long, device=self.device) if self.residual else None
        symbols = tokens.numel() + (0 if pixels is None else pixels.numel())
        if len(chunk.exceptions) and chunk.exceptions.max() >= symbols:
            raise DamagedStream("the stream is damaged: an exception lies outside of its chunk")
        doubts = torch.zeros(symbols, dtype=torch.bool)
        doubts[torch.from_numpy(chunk.exceptions.astype(np.int64))] = True
        doubts = doubts.to(self.device)
        decoder = Decoder(chunk.tokens, doubts[: tokens.numel()])
        self.walk_tokens(tokens, decoder, batch_size or count)
        decoder.finish()
        if pixels is not None:
            decoder = Decoder(chunk.pixels, doubts[tokens.numel() :])
            self.walk_pixels(pixels, tokens, decoder)
            decoder.finish()
        if digest_of(tokens, pixels) != chunk.digest:
            raise ModelMismatch("the stream decodes to other tokens here: this machine computes other probabilities")
        return tokens, pixels


def doubled(model: Any, device: torch.device) -> Any:
    """A copy in float64, in eval mode."""
    return copy.deepcopy(model).to(device).double().eval()


def digest_of(tokens: Tensor, pixels: Tensor | None) -> int:
    """The CRC-32 of ids as u32 and pixels as u8."""
    content = tokens.cpu().numpy().astype("<u4").tobytes()
    return crc32(content if pixels is None else content + pixels.cpu().numpy().astype(np.uint8).tobytes())


# Streams


def compress(
    pipeline: ImagePipeline,
    images: Tensor,
    *,
    lossless: bool = False,
    names: Sequence[str] = (),
    progress: bool = True,
) -> bytes:
    """A stream of `images`, float `(B, C, H, W)` in [-1, 1]; see `write_images`."""
    file, parts = io.BytesIO(), images.split(chunk_images(pipeline))
    write_images(pipeline, file, parts, len(images), lossless=lossless, names=names, progress=progress)
    return file.getvalue()


def write_images(
    pipeline: ImagePipeline,
    file: BinaryIO,
    parts: Iterable[Tensor],
    count: int,
    *,
    lossless: bool = False,
    names: Sequence[str] = (),
    progress: bool = True,
) -> int:
    """Write the `count` images of `parts`, batches of `chunk_images`, as a stream; returns its number of bytes.

    lossless: decoding gives the 8-bit images as they were; else what the tokenizer makes of their tokens. Raises
    `LikelihoodError` where lossless is impossible, and `StreamError` without the coder and for names that cannot be
    files.
    """
    constriction()
    models = Models(pipeline, residual=has_residual(pipeline, lossless))
    shape = pipeline.tokenizer.image_shape
    header = Header(identify(pipeline), shape, count, chunk_images(pipeline), models.residual, tuple(names))

    def chunks() -> Iterator[Chunk]:
        for _, part in zip(chunk_numbers(header, progress), parts, strict=False):
            if lossless:
                check_exact(part)
            yield models.encode(pipeline.encode_batch(part), to_values(part) if models.residual else None)

    return write_stream(file, header, chunks())


def read_images(
    pipeline: ImagePipeline, data: bytes, *, batch_size: int | None = None, progress: bool = True
) -> tuple[Header, Iterator[Tensor]]:
    """The header of a stream, and the images of each chunk in turn, float `(n, C, H, W)` in [-1, 1]. Raises
    `StreamError` for a stream that is damaged or of another pipeline; the iterator does where this machine computes
    other probabilities than the one that compressed."""
    header, chunks = read_stream(data)
    if header.pipeline != identify(pipeline):
        theirs = "x".join(map(str, header.image))
        raise ModelMismatch(f"another pipeline made the stream, one for images of {theirs}")
    most = chunk_images(pipeline)
    if min(header.images, header.chunk_images) > most:  # the prior's states for all of a chunk are in memory at once
        raise StreamError(f"the stream has {header.chunk_images} images in a chunk; this pipeline allows {most}")
    if header.lossless and not pipeline.tokenizer.has_likelihood:
        raise DamagedStream("the stream is damaged: this pipeline has no likelihood of pixels")
    constriction()
    models = Models(pipeline, residual=header.lossless)

    def images() -> Iterator[Tensor]:
        for index in chunk_numbers(header, progress):
            count = min(header.chunk_images, header.images - index * header.chunk_images)
            tokens, pixels = models.decode(chunks[index], count, batch_size)
            if pixels is None:
                yield pipeline.decode(tokens, output_type="pt")
            else:
                yield pixels.to(pipeline.device).float() / 127.5 - 1

    return header, images()


def decompress(
    pipeline: ImagePipeline,
    data: bytes,
    *,
    batch_size: int | None = None,
    max_images: int | None = None,
    progress: bool = True,
) -> Tensor:
    """All images of a stream, float `(B, C, H, W)` in [-1, 1]; all of them or an error. Raises `StreamError`, also for
    more than `max_images`, and `ValueError` for a batch size below 1."""
    if batch_size is not None:
        check_count(batch_size, "batch_size")
    header, parts = read_images(pipeline, data, batch_size=batch_size, progress=progress)
    if max_images is not None and header.images > max_images:
        raise StreamError(f"the stream has {header.images} images, at most {max_images} are allowed")
    return torch.cat([torch.empty(0, *pipeline.tokenizer.image_shape, device=pipeline.device), *parts])


def chunk_numbers(header: Header, progress: bool) -> Iterable[int]:
    """The number of each chunk; progress: with a bar if there are several."""
    return progress_bar(range(header.num_chunks), progress and header.num_chunks > 1, unit="chunk")
