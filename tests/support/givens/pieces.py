"""A resume state in pieces, as several processes write it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tokenizer.files import MANIFEST, write_manifest


def write_pieces(folder: Path, tensors: dict[str, torch.Tensor], count: int) -> None:
    """Cut tensors along their first axis, as `count` processes hold them, and write a file for each."""
    folder.mkdir()
    for number in range(count):
        pieces, offsets = {}, {}
        for name, value in tensors.items():
            if value.ndim == 0 and number:
                continue  # the first has it
            size = -(-len(value) // count) if value.ndim else 0
            piece = value[number * size : (number + 1) * size] if value.ndim else value
            at = min(number * size, len(value)) if value.ndim else 0
            pieces[name], offsets[name] = piece.clone(), {"saved_offsets": [at, *[0] * (value.ndim - 1)][: value.ndim]}
        header = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
        save_file(pieces, folder / f"shard-{number + 1:05}-model-00001-of-00001.safetensors", metadata=header)


def in_shards(state: Path, count: int = 3, **changes) -> Path:
    """Turn a state into one that `count` processes wrote; `changes` are of the tensors of `model`."""
    for path in list(state.glob("*.safetensors")):
        tensors = load_file(path)
        write_pieces(path.with_suffix(""), {**tensors, **changes} if path.stem == "model" else tensors, count)
        path.unlink()
    (state / MANIFEST).unlink()
    write_manifest(state, step=int(state.name[5:]))
    return state
