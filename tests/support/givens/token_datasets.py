"""Small token datasets, and checks that damaged ones are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import make_tokenizer

from pipelines.tokens import TokenDataset, TokenSplit, load_tokens
from pipelines.tokens.shards import smallest_type
from tokenizer.files import PipelineLoadError, write_manifest


def make_dataset(name="vqvae", labelled=True, rows=6, seed=0, **config):
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(name, (8, 8), 1, **config).eval()
    grid = tokenizer.grid

    def split(count):
        tokens = torch.randint(grid.vocab_size, (count, *grid.shape)).to(smallest_type(grid.vocab_size))
        return TokenSplit(tokens, torch.randint(3, (count,)) if labelled else None)

    names = ["cat", "dog", "eel"] if labelled else []
    return TokenDataset(
        grid, names, {"train": split(rows), "test": split(2)}, tokenizer, {"data": {"source": "here"}}, 1
    )


def refused(folder, error, *needles, seal=True):
    """Assert that loading raises `error` with all needles in its message."""
    if seal:
        write_manifest(folder)
    with pytest.raises(error) as caught:
        load_tokens(folder)
    assert isinstance(caught.value, PipelineLoadError)
    for needle in needles:
        assert str(needle) in str(caught.value), (needle, str(caught.value))
    return True


def edit_split(folder, **changes):
    tensors = {**load_file(folder / "train.safetensors"), **changes}
    (folder / "train.safetensors").unlink()
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / "train.safetensors")
