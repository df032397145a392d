"""On grids whose rows are channels or levels, a prior knows which row it draws."""

import pytest
import torch
from small import PRIORS, make_prior, make_tokenizer

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
