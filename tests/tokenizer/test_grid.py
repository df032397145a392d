"""What a grid says of its positions, and whether tokenizers mean it so."""

import pytest
import torch
from small import make_prior, make_tokenizer

from tokenizer import TokenGrid
from tokenizer.base import grid_to_dict, read_grid
from tokenizer.files import ConfigError

LEVELS = {
    "rvq": ("vqvae", {"quantizer": {"kind": "rvq", "depth": 3, "book": {"kind": "ema", "codes": 32, "dim": 8}}}),
    "lfq": ("vit", {"quantizer": {"kind": "lfq", "bits": 8, "levels": 2}}),
    "bsq": ("vqvae", {"quantizer": {"kind": "bsq", "bits": 8, "levels": 4}}),
    "klvae": ("klvae", {}),
    "posthoc": ("posthoc", {}),
}


@pytest.mark.parametrize("name", LEVELS)
def test_the_ids_of_a_position_are_those_that_its_code_is_made_of(name):
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


@pytest.mark.parametrize("name", LEVELS)
def test_an_unknown_pixel_makes_every_id_of_its_position_unknown(name):
    kind, config = LEVELS[name]
    tokenizer = make_tokenizer(kind, **config)
    known = torch.ones(1, 12, 8, dtype=torch.bool)
    known[0, 4, 3] = False  # in the patch of row 1, column 0
    unknown = (~tokenizer.known_tokens(known)).flatten().nonzero().flatten()
    assert unknown.tolist() == sorted(tokenizer.grid.cells[2].tolist())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_ids_of_a_pixel_are_its_channels_in_turn(channels):
    pixels = make_tokenizer("pixels", channels=channels, levels=256)
    images = torch.randint(256, (2, channels, 12, 8)) / 127.5 - 1
    ids = pixels.encode(images).flatten(1)[:, pixels.grid.cells]  # (B, P, channels)
    assert pixels.grid.channels == channels and pixels.grid.positions.shape == (12, 8)
    assert torch.equal(ids, ((images + 1) * 127.5).round().long().flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", ["pixels", "palette", "klvae", "vqgan"])
def test_images_of_more_tokens_than_a_grid_holds_are_a_wrong_configuration(name):
    """Which verbs tell in a line: it is the user who asks for large images, and for a tokenizer of many tokens."""
    with pytest.raises(ConfigError, match=r"^a grid holds at most 2\^20 tokens"):
        make_tokenizer(name, (4096, 4096))


@pytest.mark.parametrize(
    ("shape", "facts"),
    [
        ((6, 2), {"levels": 3}),
        ((6, 2), {"channels": 1}),
        ((6, 2), {"channels": 3}),
        ((21,), {"scales": ((1, 1), (2, 2), (4, 4))}),
    ],
)
def test_what_a_grid_says_is_written_and_read(shape, facts):
    grid = TokenGrid(shape, 16, **facts)
    assert read_grid(grid_to_dict(grid)) == grid != TokenGrid(shape, 16)
    assert sorted(grid.cells.flatten().tolist()) == list(range(len(grid)))


@pytest.mark.parametrize(
    ("shape", "facts", "message"),
    [
        ((5, 2), {"levels": 2}, "a grid of 5 rows cannot hold 2 ids for each position"),
        ((4, 2), {"levels": 0}, "levels: expected a whole number"),
        ((4, 2), {"channels": -1}, "channels: expected a whole number"),
        ((4, 2), {"channels": True}, "channels: expected a whole number"),
        ((4, 2), {"levels": 2, "channels": 2}, "neither pixels nor maps"),
    ],
)
def test_positions_that_cannot_be_are_refused(shape, facts, message):
    with pytest.raises(ValueError, match=message) as caught:
        TokenGrid(shape, 8, **facts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.uint32, torch.int32])
def test_tokens_may_be_of_any_type_that_files_of_them_hold(kind):
    tokenizer, prior = make_tokenizer("vqvae").eval(), make_prior("gpt")
    for model, run in ((tokenizer, tokenizer.decode), (prior, prior.log_prob)):
        tokens = torch.randint(model.grid.vocab_size, (2, *model.grid.shape))
        assert torch.equal(run(tokens.to(kind)), run(tokens))
        with pytest.raises(ValueError, match=f"got {model.grid.vocab_size} to {model.grid.vocab_size}"):
            run(torch.full_like(tokens, model.grid.vocab_size).to(kind))
