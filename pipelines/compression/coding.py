"""Images to bytes and back: tokens coded under the prior, and for lossless streams the pixels given the tokens.

The container is `streams`, the numbers that are coded with come from `codec`. What is coded step by step for a chunk of
images decodes in any batch size, cached or not, on any processor; a chunk is decoded again as soon as it is made, along
the other path, and stored as it is should that fail. The images of a lossy stream are made of its tokens in float32, so
that two processors may give a pixel one grey level apart.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from PIL.Image import Image as PILImage
from torch import Tensor

from prior.sampling import progress_over
from tokenizer.base import LikelihoodError
from tokenizer.likelihoods.base import to_values

from ..images.decoding import pixels_of
from .chunks import Chunk, digest, pack_bits, unpack_bits, verify
from .codec import Decoder, Encoder, Models, constriction, grid_steps, positions, weights_of
from .crc32c import Data
from .header import DEFAULT_LIMITS, GUARD, RANGE_CODER, RAW, DamagedStream, Header, Limits, ModelMismatch, expect
from .streams import Stream, parse, write_stream

if TYPE_CHECKING:
    from ..stages import Stages

CHUNK_IMAGES, CHUNK_NUMBERS = 256, 1 << 26
"""Images in a chunk: as many as this, but no more logits than that, which are held in 16 bits."""


def chunk_images(pipeline: Stages) -> int:
    """How many images a chunk holds, which is what is in memory at once."""
    return max(1, min(CHUNK_IMAGES, CHUNK_NUMBERS // (len(pipeline.prior.grid) * pipeline.prior.grid.vocab_size)))


def exact_pixels(image: PILImage, shape: tuple[int, int, int], lossless: bool) -> Tensor:
    """uint8 `(C, H, W)` of an image that has this shape already. Raises `ValueError` for another size and, if lossless,
    for what 8 bits a channel do not hold."""
    channels, height, width = shape
    modes = ("L", "1") if channels == 1 else ("RGB",)
    if image.size != (width, height):
        raise ValueError(f"the pipeline's images are {width} x {height} pixels, this is {image.width} x {image.height}")
    if lossless and image.mode not in modes:
        raise ValueError(f"the pipeline keeps images of mode {modes[0]}, this is {image.mode}")
    return torch.from_numpy(pixels_of(image, shape).copy())


def check_exact(images: Tensor) -> None:
    """Raise `ValueError` unless all of `images`, float in [-1, 1], are 8-bit values."""
    scaled = (images.double() + 1) * 127.5
    if not bool(((scaled - scaled.round()).abs() < 1e-3).all()):
        raise ValueError("lossless compression takes 8-bit images; these floats are not on the grid of 256 values")


def has_residual(pipeline: Stages, lossless: bool) -> bool:
    """Whether pixels have to be coded beside the tokens. Raises `LikelihoodError` where that can not be."""
    if not lossless or pipeline.tokenizer.reversible:
        return False
    if not pipeline.tokenizer.has_likelihood:
        raise LikelihoodError(
            f"lossless compression needs a decoder with a likelihood, and {pipeline.tokenizer.name!r} as it was made "
            "has none; lossless=False keeps the tokens alone"
        )
    return True


def compress(
    pipeline: Stages,
    images: Tensor,
    *,
    lossless: bool = False,
    names: Sequence[str] | None = None,
    checked: bool = True,
    progress: bool = True,
) -> bytes:
    """A stream of `images`, float `(B, C, H, W)` in [-1, 1]; see `write_images`."""
    file, size = io.BytesIO(), chunk_images(pipeline)
    write_images(
        pipeline,
        file,
        images.split(size),
        len(images),
        lossless=lossless,
        names=names,
        checked=checked,
        progress=progress,
    )
    return file.getvalue()


def write_images(
    pipeline: Stages,
    file: BinaryIO,
    parts: Iterable[Tensor],
    count: int,
    *,
    lossless: bool = False,
    names: Sequence[str] | None = None,
    checked: bool = True,
    progress: bool = True,
) -> int:
    """Write the `count` images of `parts`, batches of `chunk_images`, as a stream; returns its bytes.

    lossless: decoding gives the 8-bit images as they were; else what the tokenizer makes of their tokens. checked:
    decode every chunk again. Raises `LikelihoodError` where lossless can not be, `CodecError` without the coder, and
    `StreamError` for names that can not be files.
    """
    residual = has_residual(pipeline, lossless)
    if len(pipeline.prior.grid.shape) != 2:
        raise ValueError(f"compression takes grids of two axes, these tokens have {len(pipeline.prior.grid.shape)}")
    models = Models(pipeline, residual=residual)
    header = Header(
        GUARD,
        RANGE_CODER,
        residual,
        names is not None,
        models.model_id,
        models.grid.vocab_size,
        (models.grid.shape[0], models.grid.shape[1]),
        models.image_shape,
        count,
        chunk_images(pipeline),
        models.answer(),
    )
    library = constriction()

    def chunks() -> Iterator[Chunk]:
        steps = progress_over(range(header.num_chunks), progress and header.num_chunks > 1, unit="chunk")
        for index, part in zip(steps, parts, strict=False):
            if lossless:
                check_exact(part)
            tokens = pipeline.encode_batch(part).to(models.device)
            values = to_values(part).to(models.device) if residual else None
            yield encode_chunk(models, library, header, index, tokens, values, checked)

    return write_stream(file, header, chunks(), names)


@torch.inference_mode()
def encode_chunk(
    models: Models, library: Any, header: Header, index: int, tokens: Tensor, values: Tensor | None, checked: bool
) -> Chunk:
    """Tokens `(n, *grid.shape)`, and pixels `(n, C, H, W)` in a lossless stream, as a chunk that decodes here."""
    flat, coder, doubts = tokens.flatten(1)[:, models.order].cpu().numpy(), Encoder(library), []
    for rank, (steps, unsure) in enumerate(models.token_steps(tokens)):
        coder.add(flat[:, rank], weights_of(steps, unsure))
        doubts.append(unsure)
    pixels = None if values is None else Encoder(library)
    if values is not None and pixels is not None:
        for channel in range(values.shape[1]):
            steps, unsure = models.pixel_steps(tokens, values, channel)
            pixels.add(values[:, channel].flatten().cpu().numpy(), weights_of(steps, unsure))
            doubts.append(unsure)
    ids, bytes_ = as_arrays(tokens, values)
    chunk = Chunk(
        len(tokens),
        GUARD,
        positions(doubts),
        coder.bytes(),
        None if pixels is None else pixels.bytes(),
        digest(ids, bytes_),
    )
    if checked and not decodes(models, library, header, index, chunk):
        raw = pack_bits(ids, header.token_bits)
        return Chunk(len(tokens), RAW, (), raw, None if bytes_ is None else bytes_.tobytes(), chunk.digest)
    return chunk


def as_arrays(tokens: Tensor, values: Tensor | None) -> tuple[Any, Any]:
    """Tokens, and pixels as bytes, as the container checks them."""
    return tokens.cpu().numpy(), None if values is None else values.cpu().numpy().astype(np.uint8)


def decodes(models: Models, library: Any, header: Header, index: int, chunk: Chunk) -> bool:
    """Whether a chunk just made gives back what was coded, in batches of another size than it was made in."""
    try:
        decode_chunk(models, library, header, index, chunk, batch_size=max(1, chunk.count // 2 + 1))
    except (ModelMismatch, DamagedStream):
        return False
    return True


@torch.inference_mode()
def decode_chunk(
    models: Models, library: Any, header: Header, index: int, chunk: Chunk, batch_size: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Tokens `(n, *grid.shape)` and, in a lossless stream, pixels `(n, C, H, W)`, checked.

    batch_size: images evaluated at a time. Raises `ModelMismatch` where this machine computes other probabilities.
    """
    count = chunk.count
    if chunk.profile == RAW:
        tokens = torch.from_numpy(unpack_bits(chunk.tokens, count * header.num_tokens, header.token_bits))
        tokens = tokens.reshape(count, *models.grid.shape)
        raw = None if chunk.pixels is None else np.frombuffer(chunk.pixels, np.uint8).reshape(count, *header.image)
        verify(header, index, chunk, tokens.numpy(), raw)
        values = None if raw is None else torch.from_numpy(raw.astype(np.int64)).to(models.device)
        return tokens.to(models.device), values
    doubtful = torch.zeros(sum(header.symbols_in(count)), dtype=torch.bool, device=models.device)
    doubtful[list(chunk.exceptions)] = True
    tokens, values = decode_tokens(models, library, chunk, doubtful, batch_size or count), None
    if chunk.pixels is not None:
        doubtful = doubtful[count * header.num_tokens :]
        values = decode_pixels(models, library, chunk.pixels, tokens, doubtful)
    verify(header, index, chunk, *as_arrays(tokens, values))
    return tokens, values


def decode_tokens(models: Models, library: Any, chunk: Chunk, doubtful: Tensor, batch_size: int) -> Tensor:
    """The tokens `(n, *grid.shape)` of a coded chunk, each rank's in turn for all of its images."""
    count, size, decoder = chunk.count, len(models.grid), Decoder(library, chunk.tokens)
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    states, token = [models.prior.start(rows, None) for rows in sizes], None
    flat = torch.zeros(count, size, dtype=torch.long, device=models.device)
    for rank in range(size):
        last: Sequence[Tensor | None] = [None] * len(sizes) if token is None else token.split(batch_size)
        logits = [models.prior.next_logits(state, some) for state, some in zip(states, last, strict=True)]
        token = taken(decoder, torch.cat(logits), doubtful[rank * count : (rank + 1) * count])
        flat[:, models.order[rank]] = token
    finished(decoder)
    return flat.reshape(count, *models.grid.shape)


def decode_pixels(models: Models, library: Any, data: bytes, tokens: Tensor, doubtful: Tensor) -> Tensor:
    """The pixels `(n, C, H, W)` of a coded chunk, given its tokens."""
    channels, height, width = models.image_shape
    values, decoder = tokens.new_zeros(len(tokens), channels, height, width), Decoder(library, data)
    for channel, doubts in enumerate(doubtful.split(len(tokens) * height * width)):
        steps, _ = models.pixel_steps(tokens, values, channel)
        found = torch.from_numpy(decoder.take(weights_of(steps, doubts)))
        values[:, channel] = found.to(values.device).reshape(len(tokens), height, width)
    finished(decoder)
    return values


def taken(decoder: Decoder, logits: Tensor, uniform: Tensor) -> Tensor:
    """The next symbols `(rows,)`, coded under `logits` (rows, V)."""
    steps, _ = grid_steps(logits)
    return torch.from_numpy(decoder.take(weights_of(steps, uniform))).to(logits.device)


def finished(decoder: Decoder) -> None:
    """Raise `ModelMismatch` if coded bytes are left."""
    if not decoder.exhausted:
        raise ModelMismatch("coded bytes are left over: this machine computes other probabilities")


def open_stream(pipeline: Stages, data: Data, limits: Limits = DEFAULT_LIMITS) -> tuple[Stream, Models]:
    """A checked stream and the models for it. Raises a `StreamError` for a damaged or foreign stream, one of another
    model, and one that announces more than `limits`."""
    stream = parse(data, limits=limits)
    models = Models(pipeline, residual=stream.header.lossless and pipeline.tokenizer.has_likelihood)
    grid, size = (*models.grid.shape, 1)[:2], models.grid.vocab_size
    known: dict[str, Any] = {"model_id": models.model_id, "vocab_size": size, "grid": grid, "image": models.image_shape}
    expect(stream.header, **known, answer=stream.header.answer)  # whether it is the model at all, before it is run
    expect(stream.header, **known, answer=models.answer())
    return stream, models


def read_images(
    pipeline: Stages, stream: Stream, models: Models, *, batch_size: int | None = None, progress: bool = True
) -> Iterator[Tensor]:
    """The images of each chunk in turn, float `(n, C, H, W)` in [-1, 1], each checked before it is handed on."""
    header, library = stream.header, constriction()
    for index in progress_over(range(header.num_chunks), progress and header.num_chunks > 1, unit="chunk"):
        tokens, values = decode_chunk(models, library, header, index, stream.chunk(index), batch_size)
        yield pipeline.decode(tokens, output_type="pt") if values is None else values.float() / 127.5 - 1


def decompress(
    pipeline: Stages,
    data: Data,
    *,
    limits: Limits = DEFAULT_LIMITS,
    batch_size: int | None = None,
    progress: bool = True,
) -> Tensor:
    """All images of a stream, float `(B, C, H, W)` in [-1, 1]; all of them or an error. Raises a `StreamError`."""
    stream, models = open_stream(pipeline, data, limits)
    parts = list(read_images(pipeline, stream, models, batch_size=batch_size, progress=progress))
    return torch.cat(parts) if parts else torch.empty(0, *pipeline.tokenizer.image_shape, device=models.device)
