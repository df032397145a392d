"""Registers as tokens: what an image's row of ids promises, and what its first ids alone do.

Covers: tokenizer/titok.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from givens.waves import trained_on_waves
from small import QUANTIZERS, make_tokenizer, quantizer_of
from torch import Tensor

from tokenizer import Tokenizer, titok
from tokenizer.files import ConfigError
from tokenizer.losses import psnr, total_loss
from tokenizer.titok import draw_counts, powers

SINGLE = [kind for kind in QUANTIZERS if kind not in ("multiscale", "rvq", "lfq")]


def images_for(tokenizer: Tokenizer, count: int = 3) -> Tensor:
    return torch.rand(count, *tokenizer.image_shape) * 2 - 1


def loud(**config: Any) -> Any:
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
@pytest.mark.parametrize("keep", [None, "uniform", "powers"])
def test_every_quantizer(kind, keep):
    if keep and kind not in SINGLE:
        with pytest.raises(ConfigError, match=r"^keep: needs a quantizer[^\n]*$"):
            make_tokenizer("titok", quantizer=quantizer_of(kind, 1, 1), keep=keep)
        return
    tokenizer = make_tokenizer("titok", quantizer=quantizer_of(kind, 1, 1), keep=keep).train()
    assert tokenizer.grid.shape == (5 * tokenizer.levels,) and sum(tokenizer.parts) == len(tokenizer.grid)
    assert (tokenizer.levels == 1) == (kind in SINGLE) and not tokenizer.placed
    images = images_for(tokenizer)
    loss, _ = total_loss(tokenizer(images), images, {"l1": 1.0, "l2": 1.0, **tokenizer.loss_weights})
    loss.backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())
    tokenizer.eval()
    tokens, output = tokenizer.encode(images), tokenizer(images)
    assert tokens.shape == (3, *tokenizer.grid.shape) and torch.equal(tokens, output.tokens)
    with torch.inference_mode():
        assert torch.equal(tokenizer.decode(tokens), output.images)


@pytest.mark.parametrize("keep", [None, "uniform"])
def test_a_gradient_reaches_every_register(keep):
    """From the pixels: through the codes to what the encoder asks for, and to the places in the decoder."""
    tokenizer: Any = make_tokenizer("titok", keep=keep).train()
    images = images_for(tokenizer, 32)
    (tokenizer(images).images - images).square().mean().backward()
    for table in (tokenizer.encoder.queries, tokenizer.decoder[0].positions):
        assert table.shape == (5, 16) and (table.grad.abs().amax(1) > 0).all()
    for table in (tokenizer.encoder.positions, tokenizer.decoder[0].queries):
        assert table.shape == (6, 16) and (table.grad.abs().amax(1) > 0).all()


def test_registers_and_patches_are_told_apart():
    tokenizer = loud()
    images = images_for(tokenizer, 1)
    z = tokenizer.encoder(images)
    assert len(z[0].t().unique(dim=0)) == 5
    swapped = torch.cat([images[:, :, 4:8], images[:, :, :4], images[:, :, 8:]], 2)  # two rows of patches
    assert (tokenizer.encoder(swapped) - z).abs().amax(1).gt(1e-4).all(), "where a patch lies is seen by all registers"
    with torch.no_grad():
        tokenizer.encoder.queries.copy_(tokenizer.encoder.queries[:1].expand(5, -1))
        tokenizer.encoder.center.zero_()
    z = tokenizer.encoder(images)[0].t()
    torch.testing.assert_close(z, z[:1].expand(5, -1))


def test_a_code_means_something_else_in_another_register():
    """Its position in the decoder says in which one it is: without positions, their order would not matter."""
    tokenizer = loud()
    tokens = torch.arange(5)[None]
    assert (tokenizer.decode(tokens) - tokenizer.decode(tokens.flip(1))).abs().max() > 2e-3
    torch.nn.init.zeros_(tokenizer.decoder[0].positions)
    torch.testing.assert_close(tokenizer.decode(tokens), tokenizer.decode(tokens.flip(1)), atol=1e-5, rtol=0)


def test_every_token_is_seen_by_every_patch():
    tokenizer = loud()
    tokens = some_tokens(tokenizer, 1)
    whole = tokenizer.decode(tokens)
    for register in range(5):
        changed = tokens.clone()
        changed[:, register] = (changed[:, register] + 1) % 32
        moved = (tokenizer.decode(changed) - whole).abs().amax(1)[0]
        assert (moved.unfold(0, 4, 4).unfold(1, 4, 4).amax((2, 3)) > 1e-4).all()


def test_a_query_becomes_its_patch():
    """Without attention, a patch is what its query says."""
    tokenizer = loud()
    for block in tokenizer.decoder[0].blocks:
        torch.nn.init.zeros_(block.project.weight)
        torch.nn.init.zeros_(block.project.bias)
    codes = torch.randn(1, 8, 5)
    painted = tokenizer.decoder(codes)
    with torch.no_grad():
        tokenizer.decoder[0].queries[3] += torch.randn(16)  # of 3 x 2 patches: row 1, column 1
    moved = (tokenizer.decoder(codes) - painted).abs().amax((0, 1)) > 0
    assert moved.nonzero().tolist() == [[row, column] for row in range(4, 8) for column in range(4, 8)]


def test_memory_formats_give_the_same_bits():
    tokenizer = loud()
    images = images_for(tokenizer)
    assert torch.equal(tokenizer.encoder(images), tokenizer.encoder(images.to(memory_format=torch.channels_last)))
    codes = torch.randn(2, 8, 5)
    turned = codes.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(tokenizer.decoder(codes), tokenizer.decoder(turned))


# The first tokens


@pytest.mark.parametrize("keep", ["uniform", "powers"])
def test_a_prefix_decodes_as_in_training_whatever_comes_after_it(keep, monkeypatch):
    """Two routes: the tokens cut off, and all codes of which training sees the first k."""
    tokenizer = loud(keep=keep)
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


def test_masked_registers_keep_their_positions():
    """Of the mask alone, which is the same in all, their order would not be seen; of their positions it is."""
    tokenizer = loud()
    tokens = some_tokens(tokenizer, 1)[:, :2]
    before = tokenizer.decode(tokens)
    with torch.no_grad():
        tokenizer.decoder[0].positions[4] += torch.randn(16)
    assert (tokenizer.decode(tokens) - before).abs().max() > 1e-3
    with torch.no_grad():
        tokenizer.decoder[0].mask += torch.randn(16)
    assert not torch.equal(tokenizer.decode(tokens), before)


def test_registers_that_are_left_out_get_no_gradient_and_the_others_do(monkeypatch):
    tokenizer: Any = make_tokenizer("titok", keep="powers").train()
    monkeypatch.setattr(titok, "draw_counts", lambda keep, images, most: torch.full((images,), 2))
    codes = torch.randn(4, 8, 5, requires_grad=True)
    tokenizer.decoder(codes).square().mean().backward()
    assert codes.grad is not None
    assert (codes.grad.abs().amax((0, 1)) > 0).tolist() == [True, True, False, False, False]
    assert tokenizer.decoder[0].mask.grad.abs().max() > 0


def test_how_many_are_kept_is_drawn_as_named():
    torch.manual_seed(0)
    share = draw_counts("uniform", 20_000, 6).bincount(minlength=8) / 20_000
    assert share[[0, 7]].tolist() == [0, 0]
    torch.testing.assert_close(share[1:7], torch.full((6,), 1 / 6), atol=0.012, rtol=0)
    assert powers(1) == (1,) and powers(8) == (1, 2, 4, 8) and powers(6) == (1, 2, 4, 6) and powers(9)[-2:] == (8, 9)
    share = draw_counts("powers", 20_000, 6).bincount(minlength=8) / 20_000
    torch.testing.assert_close(share, torch.tensor([0, 1, 1, 0, 1, 0, 1, 0]) / 4, atol=0.012, rtol=0)


def test_training_draws_for_each_image_from_the_generator_that_a_step_seeds():
    tokenizer = make_tokenizer("titok", keep="uniform").train()
    images = images_for(tokenizer, 1).expand(8, -1, -1, -1)

    @torch.no_grad()  # so that the codebook stays as it is
    def forward(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return tokenizer(images).images

    made = forward(0)
    assert torch.equal(made, forward(0)) and not torch.equal(made, forward(1))
    assert len(made.flatten(1).unique(dim=0)) > 1, "images of a batch have numbers of their own"
    tokenizer.eval()
    state = torch.get_rng_state()
    assert len(tokenizer(images).images.flatten(1).unique(dim=0)) == 1
    assert torch.equal(torch.get_rng_state(), state)
    plain = make_tokenizer("titok", keep=None).train()
    plain(images)
    state = torch.get_rng_state()
    plain(images)
    assert torch.equal(torch.get_rng_state(), state) and not [n for n, _ in plain.named_parameters() if "mask" in n]


@pytest.mark.parametrize(
    ("config", "count", "message"),
    [
        ({"keep": "uniform"}, 0, r"takes 1 to 5 tokens of an image, got 0"),
        ({"keep": "powers"}, 6, r"takes 1 to 5 tokens of an image, got 6"),
        ({"keep": None}, 0, r"takes all 5 tokens of an image, got 0"),
        (
            {"keep": None},
            3,
            r"takes all 5 tokens of an image, got 3; prefixes need model.keep=uniform or powers in tr.*",
        ),
        ({"keep": None}, 6, r"takes all 5 tokens of an image, got 6"),
        (
            {"keep": None, "quantizer": quantizer_of("rvq", 1, 1)},
            5,
            r"takes all 15 tokens of an image, got 5; prefixes need [^\n]* quantizer with one id per register",
        ),
    ],
)
def test_another_number_of_tokens_is_refused_in_a_line(config, count, message):
    tokenizer = make_tokenizer("titok", **config)
    with pytest.raises(ValueError, match=f"^{message}$"):
        tokenizer.decode(torch.zeros(2, count, dtype=torch.long))


def test_a_prefix_is_checked_like_all_tokens():
    tokenizer = make_tokenizer("titok")
    with pytest.raises(ValueError, match=r"^token ids should lie in \[0, 32\), got 32 to 32$"):
        tokenizer.decode(torch.full((1, 2), 32))
    for wrong in (torch.zeros(1, 2), torch.zeros(1, 2, 1, dtype=torch.long), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"^tokens should be whole numbers of shape"):
            tokenizer.decode(wrong)


@pytest.mark.slow
def test_pictures_get_better_with_every_token_and_codes_are_used():
    tokenizer, images = trained_on_waves("titok", 250, dim=32, registers=8, keep="uniform")
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        usage = len(tokens.unique()) / tokenizer.grid.vocab_size
        found = [float(psnr(tokenizer.decode(tokens[:, :count]), images).mean()) for count in tokenizer.prefixes]
    assert tokenizer.prefixes == (1, 2, 4, 8) and found == sorted(found) and found[-1] > found[0] + 1.5
    mean = float(psnr(images.mean(0).expand_as(images), images).mean())
    assert found[-1] > mean + 1.5 and usage >= 0.75


def test_before_training_registers_differ_by_image_alone():
    """Not by what each says of all images, in which a shared codebook would drown; and trained ones are left alone."""
    tokenizer, images = make_tokenizer("titok", (12, 8), 1), torch.rand(300, 1, 12, 8) * 2 - 1
    with torch.no_grad():
        before = tokenizer.encoder(images).mean(0)
        tokenizer.initialize(images)
        after = tokenizer.encoder(images).mean(0)
    assert before.abs().max() > 0.01 and after.abs().max() < 1e-4
    center = tokenizer.encoder.center.detach().clone()
    tokenizer.initialize(images[:5])
    assert torch.equal(tokenizer.encoder.center, center)
    with pytest.raises(ValueError, match="images should be floats of shape"):
        tokenizer.initialize(images[..., :4])
