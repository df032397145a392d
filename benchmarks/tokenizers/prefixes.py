"""What the first tokens of a `titok` hold: bits against PSNR, and pictures from 1, 2, 4, ... tokens.

    pip install -e ".[dev]"
    python -m benchmarks.tokenizers.equal_bits set=rows data=fashion_mnist minutes=3 gpt_minutes=2   # makes them
    python -m benchmarks.tokenizers.prefixes run=runs/tokenizers/fashion_mnist_rows/seed0/titok
    python -m benchmarks.tokenizers.prefixes run=runs/tokenizers/openmoji_rows/seed0/titok picture=titok.png images=10

`run` is the folder of a contender with a tokenizer, its tokens and a GPT. For each number of first tokens k: the bits
that k ids could hold, the GPT's -log2 p of the first k (its chain rule goes from the first token on, so they are
exact), both per image, and the PSNR (dB) of what the k tokens decode to, means over all held-out images. The other
contenders of the same seed stand below. `picture` gets held-out images above what their first tokens make of them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.support.contenders.nodes import Node
from benchmarks.support.options import read_options
from benchmarks.support.tables import table_head, table_row

OPTIONS = {"run": str, "picture": None, "images": 12}
SIDE = 72  # of a shown image, in pixels


def curve(folder: Path) -> list[Node]:
    """For each number of first tokens, `bits`, `gpt_bits` and `psnr`."""
    from pipelines import ImagePipeline
    from pipelines.metrics.reconstruction import drafts
    from pipelines.tokens import load_tokens
    from tokenizer.losses import psnr

    pipe, split = (
        ImagePipeline.from_pretrained(folder / "gpt" / "pipeline"),
        load_tokens(folder / "tokens").splits["test"],
    )
    tokenizer, images = pipe.tokenizer, held_out(folder)
    decoders = drafts(tokenizer)
    if not tokenizer.prefixes:
        raise SystemExit(f"{folder}: its first tokens alone do not decode (model.keep)")
    bits, decibels = [], [[] for _ in decoders]
    for start in range(0, len(split), 250):
        rows = slice(start, start + 250)
        tokens, labels = split.rows(rows), None if split.labels is None else split.labels[rows]
        bits.append(-pipe.prior.token_log_probs(tokens, labels).double().cumsum(1) / math.log(2))
        truth = images.batch(range(start, min(start + 250, len(split))))
        for found, decode in zip(decibels, decoders, strict=True):
            found.append(psnr(decode(tokens), truth))
    each = mean(bits)
    return [
        {
            "tokens": count,
            "bits": count * math.log2(tokenizer.grid.vocab_size),
            "gpt_bits": float(each[count - 1]),
            "psnr": float(mean(found)),
        }
        for count, found in zip(tokenizer.prefixes, decibels, strict=True)
    ]


def mean(parts: list[Any]) -> Any:
    """Over the first axis of all parts together."""
    import torch

    return torch.cat(parts).double().mean(0)


def held_out(folder: Path) -> Any:
    """The images that the tokenizer of a contender was not trained on."""
    from pipelines.images import DataConfig, load_images
    from pipelines.provenance import data_beside
    from tokenizer.model import PROVENANCE

    data = data_beside(folder / "run" / "tokenizer" / PROVENANCE)
    return load_images(DataConfig.model_validate(data)).held_out


def others(folder: Path) -> dict[str, Node]:
    """The figures of all contenders of the seed that have a GPT."""
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.parent.glob("*/figures.json"))}
    return {name: figures for name, figures in found.items() if "bits_per_token" in figures}


def strip(folder: Path, count: int) -> Any:
    """`count` held-out images, evenly spread, above what their first tokens make of them, the number at the left; a PIL
    image."""
    import torch
    from PIL import Image, ImageDraw, ImageFont

    from pipelines.images.pictures import grid_picture
    from pipelines.metrics.reconstruction import drafts
    from tokenizer import Tokenizer

    tokenizer, images = Tokenizer.from_pretrained(folder / "run" / "tokenizer"), held_out(folder)
    originals = images.batch(torch.linspace(0, len(images) - 1, count).long())
    with torch.inference_mode():
        tokens = tokenizer.encode(originals)
        versions = [originals, *(decode(tokens) for decode in drafts(tokenizer))]
    board = Image.fromarray(grid_picture(torch.cat(versions), count, min_side=SIDE))
    names = ["held out", *(f"{k} token{'s' * (k > 1)}" for k in tokenizer.prefixes)]
    left, pitch = 96, board.height / len(versions)
    picture = Image.new("RGB", (left + board.width, board.height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    for row, name in enumerate(names):
        draw.text((6, int((row + 0.5) * pitch) - 9), name, fill="black", font=font)
    picture.paste(board, (left, 0))
    return picture


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    folder = Path(options.run).absolute()
    if not (folder / "gpt" / "pipeline").is_dir():
        raise SystemExit(f"{folder}: holds no gpt/pipeline; see --help")
    import torch

    with torch.inference_mode():
        found = curve(folder)
    print(table_head("tokens", "bits they could hold", "GPT: bits per image", "PSNR, dB"))
    for row in found:
        print(
            table_row([f"first {row['tokens']}", f"{row['bits']:.0f}", f"{row['gpt_bits']:.1f}", f"{row['psnr']:.2f}"])
        )
    for name, run in others(folder).items():
        bits = run["bits_per_token"] * run["tokens"]
        print(table_row([f"all {run['tokens']} of {name}", f"{run['bits']:.0f}", f"{bits:.1f}", f"{run['psnr']:.2f}"]))
    if options.picture:
        strip(folder, options.images).save(options.picture)
        print(f"\npictures from 1, 2, 4, ... tokens: {options.picture}")


if __name__ == "__main__":
    main()
