"""Registers as tokens (`titok`), and images decoded from their first tokens alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import QUANTIZERS, images_for, make_tokenizer, quantizer_of
from torch import Tensor

from tokenizer import Tokenizer, titok
from tokenizer.files import ConfigError
from tokenizer.losses import total_loss
from tokenizer.titok import draw_counts, powers


def responsive(**config: Any) -> Any:
    """A tokenizer with weights large enough that every input matters, in eval mode."""
    tokenizer = make_tokenizer("titok", **config)
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return tokenizer.eval()


def some_tokens(tokenizer: Tokenizer, count: int = 3) -> Tensor:
    return torch.randint(tokenizer.grid.vocab_size, (count, *tokenizer.grid.shape))


# All tokens


@pytest.mark.sparse
@pytest.mark.parametrize("kind", [kind for kind in QUANTIZERS if kind != "multiscale"])
def test_every_quantizer(kind):
    tokenizer = make_tokenizer("titok", quantizer=quantizer_of(kind, 1, 1), keep=None).train()
    assert tokenizer.grid.shape == (5 * tokenizer.levels,) and not tokenizer.placed
    images = images_for(tokenizer)
    total_loss(tokenizer(images), images, {"l1": 1.0, "l2": 1.0, **tokenizer.loss_weights})[0].backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())
    tokens, output = tokenizer.eval().encode(images), tokenizer(images)
    assert torch.equal(tokens, output.tokens)
    with torch.inference_mode():
        assert torch.equal(tokenizer.decode(tokens), output.images)


def test_prefixes_need_one_token_per_register():
    with pytest.raises(ConfigError, match=r"^keep: needs a quantizer[^\n]*$"):
        make_tokenizer("titok", quantizer=quantizer_of("rvq", 1, 1), keep="uniform")


@pytest.mark.parametrize("keep", [None, "uniform"])
def test_a_gradient_reaches_every_register(keep):
    """From the pixels to the queries and positions of encoder and decoder."""
    tokenizer: Any = make_tokenizer("titok", keep=keep).train()
    images = images_for(tokenizer, 32)
    (tokenizer(images).images - images).square().mean().backward()
    for table in (tokenizer.encoder.queries, tokenizer.decoder[0].positions):
        assert table.shape == (5, 16) and (table.grad.abs().amax(1) > 0).all()
    for table in (tokenizer.encoder.positions, tokenizer.decoder[0].queries):
        assert table.shape == (6, 16) and (table.grad.abs().amax(1) > 0).all()


def test_every_patch_depends_on_every_token():
    tokenizer = responsive()
    tokens = some_tokens(tokenizer, 1)
    whole = tokenizer.decode(tokens)
    for register in range(5):
        changed = tokens.clone()
        changed[:, register] = (changed[:, register] + 1) % 32
        moved = (tokenizer.decode(changed) - whole).abs().amax(1)[0]
        assert (moved.unfold(0, 4, 4).unfold(1, 4, 4).amax((2, 3)) > 1e-4).all()


# The first tokens


@pytest.mark.parametrize("keep", ["uniform", "powers"])
def test_a_prefix_decodes_as_in_training(keep, monkeypatch):
    """The first k tokens alone give the image of training's mask after k tokens."""
    tokenizer = responsive(keep=keep)
    tokens, others = some_tokens(tokenizer), some_tokens(tokenizer)
    whole = tokenizer.decode(tokens)
    for count in range(1, 6):
        found = tokenizer.decode(tokens[:, :count])
        mixed = torch.cat([tokens[:, :count], others[:, count:]], 1)
        monkeypatch.setattr(titok, "draw_counts", lambda keep, images, most, count=count: torch.full((images,), count))
        decoder = tokenizer.decoder.train()
        trained = decoder(tokenizer.quantizer.lookup(mixed)).clamp(-1, 1)
        tokenizer.eval()
        torch.testing.assert_close(found, trained)
        assert (torch.equal(found, whole)) == (count == 5)
        assert torch.equal(found[1:], tokenizer.decode(tokens[1:, :count])), "images do not mix"


def test_counts_are_drawn_from_the_named_distribution():
    torch.manual_seed(0)
    share = draw_counts("uniform", 20_000, 6).bincount(minlength=8) / 20_000
    assert share[[0, 7]].tolist() == [0, 0]
    torch.testing.assert_close(share[1:7], torch.full((6,), 1 / 6), atol=0.012, rtol=0)
    assert powers(1) == (1,) and powers(8) == (1, 2, 4, 8) and powers(6) == (1, 2, 4, 6) and powers(9)[-2:] == (8, 9)
    share = draw_counts("powers", 20_000, 6).bincount(minlength=8) / 20_000
    torch.testing.assert_close(share, torch.tensor([0, 1, 1, 0, 1, 0, 1, 0]) / 4, atol=0.012, rtol=0)


def test_training_draws_a_count_for_each_image_from_the_global_generator():
    tokenizer = make_tokenizer("titok", keep="uniform").train()
    images = images_for(tokenizer, 1).expand(8, -1, -1, -1)
    made = []
    with torch.no_grad():  # so that the codebook stays as it is
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            made.append(tokenizer(images).images)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert len(made[0].flatten(1).unique(dim=0)) > 1, "each image of a batch has its own count"


@pytest.mark.parametrize(("keep", "count"), [("uniform", 0), (None, 3)])
def test_a_wrong_number_of_tokens_is_refused(keep, count):
    tokenizer = make_tokenizer("titok", keep=keep)
    with pytest.raises(ValueError, match=f"got {count}"):
        tokenizer.decode(torch.zeros(2, count, dtype=torch.long))


def test_initialize_removes_the_mean_of_each_register():
    """Otherwise each register would use few codes of a shared codebook. Trained registers are not changed."""
    tokenizer, images = make_tokenizer("titok", (12, 8), 1), torch.rand(300, 1, 12, 8) * 2 - 1
    with torch.no_grad():
        before = tokenizer.encoder(images).mean(0)
        tokenizer.initialize(images)
        after = tokenizer.encoder(images).mean(0)
    assert before.abs().max() > 0.01 and after.abs().max() < 1e-4
    center = tokenizer.encoder.center.detach().clone()
    tokenizer.initialize(images[:5])
    assert torch.equal(tokenizer.encoder.center, center)
