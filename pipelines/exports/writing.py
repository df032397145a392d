"""A folder with a tokenizer's encoder and decoder as files of a format, and what a program has to know to use them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer import Tokenizer
from tokenizer.base import grid_to_dict
from tokenizer.files import FolderKind, atomic_folder, write_json, write_manifest

from ..images import to_float
from .checks import TOLERANCE, Checked, check
from .formats import FORMATS, Format, require_installed
from .tracing import NAMES, PARTS, Part, trace

FACTS, FORMAT_VERSION = "export.json", 1
EXPORT = FolderKind("an exported tokenizer", FACTS, lambda facts: facts.get("_class_name") == "ExportedTokenizer")
RANDOM = 8  # images of noise on which a file is checked


def export_tokenizer(tokenizer: Tokenizer, folder: str | Path, format: Format, images: Tensor | None = None) -> Checked:
    """Write `tokenizer` as `encoder.onnx` and `decoder.onnx` (or `.pt2`), check the files by running them, and return
    what was compared. The folder appears whole or not at all.

    images: float `(B, C, H, W)` in [-1, 1], on which it is checked beside images of noise. Raises `ExportError` for a
    tokenizer that cannot be recorded, a package that is missing, and a file that gives something else; `PathError` if
    something else is in the folder; `ValueError` for images of another size or type.
    """
    require_installed(format)
    tokenizer = copy.deepcopy(tokenizer).cpu().eval()  # the caller's stays on its device, beside its prior
    example = noise(tokenizer.image_shape)  # and no image of the user's: a .pt2 file holds what it was recorded on
    with torch.no_grad():
        examples: dict[Part, Tensor] = {"encoder": example, "decoder": tokenizer.encode(example)}
    if images is not None:
        tokenizer.check_images(images)
    some = example if images is None else torch.cat([example, images.to(example)])
    kind = FORMATS[format]
    with atomic_folder(folder, kind=EXPORT) as target:
        paths = {part: target / f"{part}{kind.suffix}" for part in PARTS}
        for part, path in paths.items():
            kind.write(trace(tokenizer, part, examples[part]), part, path)
        compared = check(tokenizer, kind.load(paths["encoder"]), kind.load(paths["decoder"]), some)
        write_json(target / FACTS, facts_of(tokenizer, format, compared))
        write_manifest(target)
    return compared


def noise(shape: tuple[int, int, int]) -> Tensor:
    """8-bit images in which every pixel is random, `(RANDOM, C, H, W)` in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    return to_float(torch.randint(256, (RANDOM, *shape), generator=generator, dtype=torch.uint8))


def facts_of(tokenizer: Tokenizer, format: Format, compared: Checked) -> dict[str, Any]:
    """What `export.json` says: which file takes and gives what, and how far it was checked."""
    channels, height, width = tokenizer.image_shape
    forms = {
        "images": {"type": "float32", "shape": ["batch", channels, height, width], "range": [-1, 1]},
        "tokens": {
            "type": "int64",
            "shape": ["batch", *tokenizer.grid.shape],
            "range": [0, tokenizer.grid.vocab_size - 1],
        },
    }
    parts: dict[str, Any] = {}
    for part in PARTS:
        given, made = NAMES[part]
        parts[part] = {
            "file": f"{part}{FORMATS[format].suffix}",
            "takes": {"name": given, **forms[given]},
            "gives": {"name": made, **forms[made]},
        }
    return {
        "_class_name": "ExportedTokenizer",
        "format_version": FORMAT_VERSION,
        "format": format,
        "tokenizer": tokenizer.name,
        "fingerprint": tokenizer.fingerprint(),
        "image_size": [height, width],
        "channels": channels,
        "grid": grid_to_dict(tokenizer.grid),
        **parts,
        "checked": {**compared._asdict(), "tolerance": TOLERANCE},
    }
