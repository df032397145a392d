"""Write clips as files: GIF, animated PNG and MP4."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.GifImagePlugin import getdata

from ..config import UserError

MP4 = ".mp4"
ANIMATIONS = (".gif", MP4)
MILLISECONDS = 150  # that a frame is shown
MIN_SIDE = 128  # of an MP4: players show smaller ones badly, or not at all
QUALITY = 5  # of an MP4: the constant rate factor of H.264, from 0 (exact) to 51
COLOURS = 256  # of a GIF


def require_video(key: str | None = None) -> None:
    if find_spec("av") is None:
        prefix = "" if key is None else f"{key}: "
        raise UserError(f'{prefix}MP4 needs the package av: pip install "smalti[video]"')


def write_animation(frames: np.ndarray, path: Path) -> None:
    """Write uint8 frames (T, H, W, 1 or 3) as GIF or MP4, in place; for use under temporary names."""
    if path.suffix.lower() == MP4:
        write_mp4(frames, path)
    else:
        path.write_bytes(gif_bytes(frames))


def gif_bytes(frames: np.ndarray) -> bytes:
    """Encode uint8 frames (T, H, W, 1 or 3) as a GIF that repeats. All frames have one palette, so that still areas do
    not flicker: all greys, or the 256 colours that suit the clip best.

    Pillow encodes the frames, but not the file: it merges a frame with an equal one before, so that a clip read again
    would be shorter."""
    count, height, width = frames.shape[:3]
    pixels = frames.reshape(count * height, width, -1)
    strip = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if strip.mode == "RGB":
        strip = strip.quantize(COLOURS, Image.Quantize.MEDIANCUT, kmeans=1)  # exact for at most 256 colours
    file = io.BytesIO()
    file.write(b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0))
    file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # repeat for ever
    for frame in range(count):
        image = strip.crop((0, frame * height, width, (frame + 1) * height))
        file.writelines(getdata(image, duration=MILLISECONDS, include_color_table=True))
    file.write(b";")
    return file.getvalue()


def animated_png(frames: Sequence[Image.Image]) -> bytes:
    """Encode frames as a lossless animated PNG that repeats. Equal frames stay apart, as in `gif_bytes`: Pillow merges
    only those that are blended in the same way."""
    file, ways = io.BytesIO(), [k % 2 for k in range(len(frames))]
    first, *rest = frames
    first.save(file, "PNG", save_all=True, append_images=rest, duration=MILLISECONDS, loop=0, blend=ways)
    return file.getvalue()


def write_mp4(frames: np.ndarray, path: Path) -> None:
    """Write an MP4 that every player shows (H.264, yuv420p), which needs even sides: small frames are enlarged by
    repeating their pixels, and an odd side gets one more pixel."""
    import av

    scale = max(1, -(-MIN_SIDE // min(frames.shape[1:3])))
    frames = frames.repeat(scale, 1).repeat(scale, 2)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), "edge")
    frames = frames.repeat(3 // frames.shape[3], 3)  # grey as RGB
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Fraction(1000, MILLISECONDS), options={"crf": str(QUALITY)})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        file.mux(stream.encode())
