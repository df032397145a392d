"""On grids whose rows are channels or levels, a prior knows which row it draws."""

import pytest
import torch
from costs import all_steps
from small import PRIORS, logits_of, make_prior, make_tokenizer

from prior import Prior
from prior.layers import RasterConfig, RowBias

HAVE_A_CHOICE = ("pixelcnn", "gated_pixelcnn")
both = pytest.mark.parametrize("name", HAVE_A_CHOICE)
RVQ = {"kind": "rvq", "depth": 2, "book": {"kind": "ema", "codes": 8, "dim": 4}}
LAYOUTS = {
    "channels": lambda: make_tokenizer("pixels", (6, 4)),
    "levels": lambda: make_tokenizer("vqvae", (40, 16), quantizer=RVQ),
}


def rows_alike(model):
    """How much the logits of two rows differ at least, with the same ids above and beside them, away from the edges."""
    height, width = model.grid.shape
    tokens = torch.zeros(1, height, width, dtype=torch.long)
    logits = model.double()(tokens).detach().view(height, width, -1)[height // 2 :]
    differences = (logits[:, None] - logits).abs().amax((2, 3))
    return float((differences + torch.eye(len(logits))).min())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in PRIORS if name != "next_scale"])
def test_every_prior_knows_which_row_it_draws(name, layout):
    """The same content above is continued differently: red is not green, level 1 is not level 2."""
    grid = LAYOUTS[layout]().grid
    assert len(grid.shape) == 2 and grid.shape[0] >= 18
    assert rows_alike(make_prior(name, grid.shape, grid.vocab_size)) > 1e-6


@both
def test_a_convolution_without_row_biases_does_not(name):
    assert rows_alike(make_prior(name, (18, 4), row_embedding=False)) == 0


BIASED = ("pixelcnn", "gated_pixelcnn", "pixelcnn_pp", "pixelsnail")
TABLES = [
    (name, key)
    for name in BIASED
    for key, module in make_prior(name).named_modules()
    if key.endswith("label") or isinstance(module, RowBias)
]


@pytest.mark.parametrize(("name", "key"), TABLES)
def test_every_table_of_labels_and_rows_reaches_the_logits_in_forward_and_in_steps(name, key):
    """With all other tables at zero; that of a row moves no logits above the row."""
    model = make_prior(name, (6, 4)).double()
    tokens, labels = torch.randint(5, (1, 6, 4)).expand(4, 6, 4), torch.arange(4)
    with torch.no_grad():
        for other in (other for kind, other in TABLES if kind == name and other != key):
            model.get_submodule(other).weight.zero_()
        table, before = model.get_submodule(key), logits_of(model, tokens, labels)
        if isinstance(table, RowBias):
            table.weight[3] += torch.randn_like(table.weight[3])
            moved = (logits_of(model, tokens, labels) - before).abs().amax((0, 2)).view(6, 4) > 1e-9
            assert not moved[:3].any() and moved[3].any()
        else:
            assert ((before[:3] - before[3]).abs().amax((1, 2)) > 1e-6).all()
            assert torch.equal(model(tokens), before[3:].expand_as(before)), "no label is the null class"
        assert (all_steps(model, tokens, labels) - logits_of(model, tokens, labels)).abs().max() < 1e-9


CONVOLUTIONAL = [name for name in PRIORS if issubclass(Prior.find(name).Config, RasterConfig)]


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_channels_of_a_pixel_see_those_before_them(name):
    """PixelCNN's masks between channels come out of the order of rows: green is painted knowing the red of its pixel,
    blue knowing both, and nothing that comes later. Unlike there, red knows no green or blue of its own row, and green
    knows the red to its right."""
    pixels = make_tokenizer("pixels", (4, 5))
    model, (row, column) = make_prior(name, pixels.grid.shape).double(), (2, 2)
    images = torch.rand(16, 3, 4, 5) * 2 - 1
    before = model(pixels.encode(images))
    for channel in range(3):
        changed = images.clone()
        changed[:, channel, row, column] *= -1
        moved = (model(pixels.encode(changed)) - before).abs().amax((0, 2)).view(4, 3, 5) > 1e-12  # (H, C, W)
        assert moved[row, :, column].tolist() == [later > channel for later in range(3)]
        assert not moved[:row].any() and not moved[row, :channel].any() and not moved[row, channel, :column].any()
        assert moved[row, channel, column + 1] and moved[row, channel + 1 :, column - 1 : column + 2].all()
