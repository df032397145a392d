"""Grids of tokens: levels, channels and scales, their JSON form, and the tokenizers that have them."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small import make_prior, make_tokenizer

from tokenizer import TokenGrid
from tokenizer.base import grid_to_dict, read_grid
from tokenizer.scales import Resize

sides = st.integers(1, 9)


@st.composite
def grids(draw) -> TokenGrid:
    """A grid with levels, channels, scales, or none of them."""
    height, width, vocab_size = draw(sides), draw(sides), draw(st.integers(1, 1 << 20))
    kind = draw(st.sampled_from(["plain", "levels", "channels", "scales"]))
    if kind == "scales":
        scales = sorted(draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=4)))
        scales = [(low, max(width for _, width in scales[: index + 1])) for index, (low, _) in enumerate(scales)]
        return TokenGrid((sum(map(math.prod, scales)),), vocab_size, tuple(scales))
    count = draw(st.integers(1, 4))
    return TokenGrid((count * height, width), vocab_size, **({} if kind == "plain" else {kind: count}))


@given(grids())
def test_a_grid_is_written_and_read_again(grid):
    assert read_grid(json.loads(json.dumps(grid_to_dict(grid)))) == grid
    assert sorted(grid.cells.flatten().tolist()) == list(range(len(grid)))
    assert len(grid.positions) * grid.ids_per_position == len(grid)


WRONG = [
    ({"shape": []}, "shape"),
    ({"shape": [True]}, "shape"),
    ({"shape": [2048, 2048]}, "2.20"),
    ({"vocab_size": (1 << 20) + 1}, "2.20"),
    ({"levels": 2}, "21 rows"),
    ({"levels": 3, "channels": 3}, "levels"),
    ({"scales": [[1, 1], [2, 2]]}, "scales"),
    ({"scales": [[4, 5, 1]]}, "scales"),
    ({"scales": 21}, "scales"),
    ({"rows": 3}, "rows"),
]


@pytest.mark.parametrize(("values", "key"), WRONG, ids=str)
def test_a_wrong_grid_is_refused(values, key):
    with pytest.raises(ValueError, match=key) as caught:
        read_grid({"shape": [21], "vocab_size": 8, **values})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.uint32])
def test_tokens_may_have_any_integer_type_of_token_files(kind):
    tokenizer, prior = make_tokenizer("vqvae").eval(), make_prior("gpt")
    for model, run in ((tokenizer, tokenizer.decode), (prior, prior.log_prob)):
        tokens = torch.randint(model.grid.vocab_size, (2, *model.grid.shape))
        assert torch.equal(run(tokens.to(kind)), run(tokens))
        with pytest.raises(ValueError, match=str(model.grid.vocab_size)):
            run(torch.full_like(tokens, model.grid.vocab_size).to(kind))


# Levels and channels

LEVELS = {
    "rvq": ("vqvae", {"quantizer": {"kind": "rvq", "depth": 3, "book": {"kind": "ema", "codes": 32, "dim": 8}}}),
    "lfq": ("vit", {"quantizer": {"kind": "lfq", "bits": 8, "levels": 2}}),
    "klvae": ("klvae", {}),
    "posthoc": ("posthoc", {}),
}


@pytest.mark.parametrize("name", LEVELS)
def test_the_ids_of_a_position_are_those_of_its_vector_and_its_patch(name):
    kind, config = LEVELS[name]
    tokenizer = make_tokenizer(kind, **config).eval()
    grid, quantizer = tokenizer.grid, (tokenizer.vae if kind == "posthoc" else tokenizer).quantizer
    assert grid.levels == grid.ids_per_position == tokenizer.levels > 1 and grid.positions.shape == (3, 2)
    tokens = torch.randint(grid.vocab_size, (1, *grid.shape))
    before = quantizer.lookup(tokens).flatten(2)
    for position, cells in enumerate(grid.cells):
        for cell in cells:
            changed = tokens.flatten(1).clone()
            changed[0, cell] = (changed[0, cell] + 1) % grid.vocab_size
            moved = (quantizer.lookup(changed.view_as(tokens)).flatten(2) != before).any(1)[0]
            assert moved.nonzero().flatten().tolist() == [position]
    known = torch.ones(1, 12, 8, dtype=torch.bool)
    known[0, 4, 3] = False  # in the patch of row 1, column 0
    unknown = (~tokenizer.known_tokens(known)).flatten().nonzero().flatten()
    assert unknown.tolist() == sorted(grid.cells[2].tolist())


# Scales


@pytest.mark.parametrize("scales", [((1, 1), (2, 2), (4, 4), (7, 7)), ((1, 4), (3, 4), (3, 4))])
def test_resizing_by_matrices_is_torchs_resizing(scales):
    """Down is the mean over areas, up is bicubic."""
    resize = Resize(scales)
    whole = torch.randn(2, 5, *scales[-1])
    for k, size in enumerate(scales):
        small = torch.randn(2, 5, *size)
        torch.testing.assert_close(resize.down(whole, k), F.interpolate(whole, size=size, mode="area"))
        torch.testing.assert_close(resize.up(small, k), F.interpolate(small, size=scales[-1], mode="bicubic"))
    assert torch.equal(resize.up(whole, len(scales) - 1), whole) and torch.equal(resize.down(whole, -1), whole)
    tokens = torch.arange(2 * sum(map(math.prod, scales))).reshape(2, -1)
    maps = list(resize.split(tokens))
    assert [tuple(part.shape[1:]) for part in maps] == list(scales)
    assert torch.equal(torch.cat([part.flatten(1) for part in maps], 1), tokens)
