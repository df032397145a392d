"""The chunks of one stream, coded and decoded: ids under the prior, and pixels given the tokens.

What is coded step by step for a chunk of images decodes in batches of any size, cached or not, on any processor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .chunks import Chunk, Ids, Pixels, digest, pack_bits, unpack_bits, verify
from .codec import Decoder, Encoder, Models, constriction, grid_steps, positions, weights_of
from .header import GUARD, RAW, DamagedStream, Header, ModelMismatch


class Coder:
    """Codes the chunks of the stream that `header` begins, and decodes them, under `models`.

    Tokens are `(n, *grid.shape)`; pixels, which a lossless stream may have beside them, `(n, C, H, W)` in 0 to 255.
    Raises `CodecError` without the package constriction.
    """

    def __init__(self, models: Models, header: Header) -> None:
        self.models = models
        self.header = header
        self.constriction = constriction()

    # Coding

    @torch.inference_mode()
    def encode(self, index: int, tokens: Tensor, pixels: Tensor | None, *, checked: bool = True) -> Chunk:
        """Chunk `index`. checked: decode it at once, and store tokens and pixels as they are should that fail."""
        chunk = self.coded(tokens, pixels)
        if checked and not self.decodes(index, chunk):
            return self.stored(tokens, pixels)
        return chunk

    def coded(self, tokens: Tensor, pixels: Tensor | None) -> Chunk:
        """Tokens and pixels under the models' probabilities."""
        coded_tokens, doubts = self.encode_tokens(tokens)
        coded_pixels = None
        if pixels is not None:
            coded_pixels, more_doubts = self.encode_pixels(tokens, pixels)
            doubts += more_doubts
        checksum = digest(*as_arrays(tokens, pixels))
        return Chunk(len(tokens), GUARD, positions(doubts), coded_tokens, coded_pixels, checksum)

    def stored(self, tokens: Tensor, pixels: Tensor | None) -> Chunk:
        """Tokens and pixels as they are, in whole bits."""
        ids, values = as_arrays(tokens, pixels)
        raw_pixels = None if values is None else values.tobytes()
        return Chunk(len(tokens), RAW, (), pack_bits(ids, self.header.token_bits), raw_pixels, digest(ids, values))

    def encode_tokens(self, tokens: Tensor) -> tuple[bytes, list[Tensor]]:
        """The coded ids, each rank's in turn for all images, and which of them are in doubt."""
        encoder = Encoder(self.constriction)
        ids = tokens.flatten(1)[:, self.models.order].cpu().numpy()
        doubts = []
        for rank, (steps, unsure) in enumerate(self.models.token_steps(tokens)):
            encoder.add(ids[:, rank], weights_of(steps, unsure))
            doubts.append(unsure)
        return encoder.bytes(), doubts

    def encode_pixels(self, tokens: Tensor, pixels: Tensor) -> tuple[bytes, list[Tensor]]:
        """The coded pixels, channel by channel, and which of them are in doubt."""
        encoder = Encoder(self.constriction)
        doubts = []
        for channel in range(pixels.shape[1]):
            steps, unsure = self.models.pixel_steps(tokens, pixels, channel)
            encoder.add(pixels[:, channel].flatten().cpu().numpy(), weights_of(steps, unsure))
            doubts.append(unsure)
        return encoder.bytes(), doubts

    def decodes(self, index: int, chunk: Chunk) -> bool:
        """Whether a chunk just made gives back what was coded, in batches of another size than it was made in."""
        try:
            self.decode(index, chunk, batch_size=chunk.count // 2 + 1)
        except (ModelMismatch, DamagedStream):
            return False
        return True

    # Decoding

    @torch.inference_mode()
    def decode(self, index: int, chunk: Chunk, batch_size: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The tokens of chunk `index`, and its pixels if it has any, checked.

        batch_size: images evaluated at a time. Raises `ModelMismatch` where this machine computes other probabilities.
        """
        tokens, pixels = self.unpacked(chunk) if chunk.profile == RAW else self.decoded(chunk, batch_size)
        verify(self.header, index, chunk, *as_arrays(tokens, pixels))
        return tokens, pixels

    def unpacked(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """The inverse of `stored`."""
        ids = unpack_bits(chunk.tokens, chunk.count * self.header.num_tokens, self.header.token_bits)
        tokens = torch.from_numpy(ids).reshape(chunk.count, *self.models.grid.shape).to(self.models.device)
        if chunk.pixels is None:
            return tokens, None
        values = np.frombuffer(chunk.pixels, np.uint8).reshape(chunk.count, *self.header.image)
        return tokens, torch.from_numpy(values.astype(np.int64)).to(self.models.device)

    def decoded(self, chunk: Chunk, batch_size: int | None) -> tuple[Tensor, Tensor | None]:
        """The inverse of `coded`."""
        doubtful = torch.zeros(sum(self.header.symbols_in(chunk.count)), dtype=torch.bool, device=self.models.device)
        doubtful[list(chunk.exceptions)] = True
        num_tokens = chunk.count * self.header.num_tokens
        tokens = self.decode_tokens(chunk, doubtful[:num_tokens], batch_size or chunk.count)
        if chunk.pixels is None:
            return tokens, None
        return tokens, self.decode_pixels(chunk.pixels, tokens, doubtful[num_tokens:])

    def decode_tokens(self, chunk: Chunk, doubtful: Tensor, batch_size: int) -> Tensor:
        """The tokens of a coded chunk, each rank's in turn for all of its images; doubtful: `(N * n,)`."""
        prior, count = self.models.prior, chunk.count
        decoder = Decoder(self.constriction, chunk.tokens)
        sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
        states = [prior.start(size, None) for size in sizes]
        last: Sequence[Tensor | None] = [None] * len(sizes)
        walked = torch.zeros(count, len(self.models.grid), dtype=torch.long, device=self.models.device)
        unsure, rank = doubtful.split(count), 0
        for size in prior.blocks:
            logits = torch.cat([prior.next_logits(state, tokens) for state, tokens in zip(states, last, strict=True)])
            for steps in grid_steps(logits)[0].unbind(1):
                walked[:, rank] = torch.from_numpy(decoder.take(weights_of(steps, unsure[rank])))
                rank += 1
            last = walked[:, rank - size : rank].split(batch_size)
        decoder.finish()
        flat = torch.empty_like(walked)
        flat[:, self.models.order] = walked
        return flat.reshape(count, *self.models.grid.shape)

    def decode_pixels(self, coded: bytes, tokens: Tensor, doubtful: Tensor) -> Tensor:
        """The pixels of a coded chunk, given its tokens; doubtful: `(C * n * H * W,)`."""
        count, (channels, height, width) = len(tokens), self.models.image_shape
        decoder = Decoder(self.constriction, coded)
        pixels = tokens.new_zeros(count, channels, height, width)
        for channel, unsure in enumerate(doubtful.split(count * height * width)):
            steps, _ = self.models.pixel_steps(tokens, pixels, channel)
            found = torch.from_numpy(decoder.take(weights_of(steps, unsure)))
            pixels[:, channel] = found.to(pixels.device).reshape(count, height, width)
        decoder.finish()
        return pixels


def as_arrays(tokens: Tensor, pixels: Tensor | None) -> tuple[Ids, Pixels | None]:
    """Tokens, and pixels as bytes, as the container checks them."""
    return tokens.cpu().numpy(), None if pixels is None else pixels.cpu().numpy().astype(np.uint8)
