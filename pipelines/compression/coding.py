"""Images to bytes and back: tokens coded under the prior, and for lossless streams the pixels given the tokens.

`streams` is the container, `coder` codes its chunks, `codec` makes the numbers they are coded with. The images of a
lossy stream are made from its tokens in float32, so a pixel may differ by one grey level between two processors.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from PIL import ImageOps
from PIL.Image import Image as PILImage
from torch import Tensor

from prior.sampling import check_count, progress_bar
from tokenizer.base import LikelihoodError, in_finest
from tokenizer.likelihoods import to_values

from ..images.decoding import pixels_of
from .chunks import Chunk
from .codec import Models
from .coder import Coder
from .header import DEFAULT_LIMITS, GUARD, RANGE_CODER, Data, Header, Limits, StreamLimit, expect
from .streams import Stream, parse, write_stream

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline

CHUNK_IMAGES = 256
"""Most images in a chunk."""
CHUNK_NUMBERS = 1 << 26
"""Most logits of a chunk, which are held in 16 bits."""


def chunk_images(pipeline: ImagePipeline) -> int:
    """How many images a chunk holds, which is what is in memory at once."""
    return max(1, min(CHUNK_IMAGES, CHUNK_NUMBERS // (len(pipeline.prior.grid) * pipeline.prior.grid.vocab_size)))


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


def compress(
    pipeline: ImagePipeline,
    images: Tensor,
    *,
    lossless: bool = False,
    names: Sequence[str] | None = None,
    checked: bool = True,
    progress: bool = True,
) -> bytes:
    """A stream of `images`, float `(B, C, H, W)` in [-1, 1]; see `write_images`."""
    file = io.BytesIO()
    parts = images.split(chunk_images(pipeline))
    options: dict[str, Any] = {"lossless": lossless, "names": names, "checked": checked, "progress": progress}
    write_images(pipeline, file, parts, len(images), **options)
    return file.getvalue()


def write_images(
    pipeline: ImagePipeline,
    file: BinaryIO,
    parts: Iterable[Tensor],
    count: int,
    *,
    lossless: bool = False,
    names: Sequence[str] | None = None,
    checked: bool = True,
    progress: bool = True,
) -> int:
    """Write the `count` images of `parts`, batches of `chunk_images`, as a stream; returns its number of bytes.

    lossless: decoding gives the 8-bit images as they were; else what the tokenizer makes of their tokens. checked:
    decode every chunk again. Raises `LikelihoodError` where lossless is impossible, `CodecError` without the coder, and
    `StreamError` for names that cannot be files.
    """
    residual = has_residual(pipeline, lossless)
    if len(pipeline.prior.grid.shape) > 2:
        raise ValueError(f"compression takes grids of one or two axes, not {len(pipeline.prior.grid.shape)}")
    models = Models(pipeline, residual=residual)
    header = Header(
        profile=GUARD,
        coder=RANGE_CODER,
        lossless=residual,
        named=names is not None,
        model_id=models.model_id,
        vocab_size=models.grid.vocab_size,
        grid=axes_of(models.grid.shape),
        image=models.image_shape,
        num_images=count,
        chunk_images=chunk_images(pipeline),
        answer=models.answer(),
    )
    coder = Coder(models, header)

    def chunks() -> Iterator[Chunk]:
        for index, part in zip(chunks_of(header, progress), parts, strict=False):
            if lossless:
                check_exact(part)
            tokens = pipeline.encode_batch(part).to(models.device)
            pixels = to_values(part).to(models.device) if residual else None
            yield coder.encode(index, tokens, pixels, checked=checked)

    return write_stream(file, header, chunks(), names)


def axes_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """A grid's shape as a header has it, where one axis is a single column."""
    rows, columns, *_ = (*shape, 1)
    return rows, columns


def open_stream(pipeline: ImagePipeline, data: Data, limits: Limits = DEFAULT_LIMITS) -> tuple[Stream, Coder]:
    """A checked stream and its coder. Raises a `StreamError` for a damaged or foreign stream, one of another model,
    and one that announces more than `limits`."""
    stream = parse(data, limits=limits)
    models = Models(pipeline, residual=stream.header.lossless and pipeline.tokenizer.has_likelihood)
    known: dict[str, Any] = {
        "model_id": models.model_id,
        "vocab_size": models.grid.vocab_size,
        "grid": axes_of(models.grid.shape),
        "image": models.image_shape,
    }
    expect(stream.header, **known, answer=stream.header.answer)  # whether it is the model at all, before it is run
    most, announced = chunk_images(pipeline), min(stream.header.num_images, stream.header.chunk_images)
    if announced > most:  # the states of the prior for all of a chunk are in memory at once
        raise StreamLimit(f"header: announces {announced} images in a chunk, at most {most} are allowed by this model")
    expect(stream.header, **known, answer=models.answer())
    return stream, Coder(models, stream.header)


def read_images(
    pipeline: ImagePipeline, stream: Stream, coder: Coder, *, batch_size: int | None = None, progress: bool = True
) -> Iterator[Tensor]:
    """The images of each chunk in turn, float `(n, C, H, W)` in [-1, 1], each checked before it is returned."""
    for index in chunks_of(stream.header, progress):
        tokens, pixels = coder.decode(index, stream.chunk(index), batch_size)
        yield pipeline.decode(tokens, output_type="pt") if pixels is None else pixels.float() / 127.5 - 1


def decompress(
    pipeline: ImagePipeline,
    data: Data,
    *,
    limits: Limits = DEFAULT_LIMITS,
    batch_size: int | None = None,
    progress: bool = True,
) -> Tensor:
    """All images of a stream, float `(B, C, H, W)` in [-1, 1]; all of them or an error. Raises a `StreamError`, and
    `ValueError` for a batch size below 1."""
    if batch_size is not None:
        check_count(batch_size, "batch_size")
    stream, coder = open_stream(pipeline, data, limits)
    parts = list(read_images(pipeline, stream, coder, batch_size=batch_size, progress=progress))
    return torch.cat(parts) if parts else torch.empty(0, *pipeline.tokenizer.image_shape, device=coder.models.device)


def chunks_of(header: Header, progress: bool) -> Iterable[int]:
    """The number of each chunk; progress: with a bar if there are several."""
    return progress_bar(range(header.num_chunks), progress and header.num_chunks > 1, unit="chunk")
