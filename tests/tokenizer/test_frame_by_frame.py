"""Tokenizers of clips: each frame is encoded on its own by an image tokenizer."""

import pytest
import torch
from small import make_tokenizer

from tokenizer import TokenGrid, Tokenizer
from tokenizer.files import ConfigError
from tokenizer.frame_by_frame import FrameByFrame

FRAMES = 3


def clips_for(tokenizer, count=2):
    """Random clips `(B, T, C, H, W)` of an image tokenizer's frames."""
    return torch.randint(256, (count, FRAMES, *tokenizer.image_shape)) / 127.5 - 1


@pytest.mark.parametrize("kind", ["vqvae", "vit", "vqgan", "palette", "maskgit"])
def test_a_clip_is_its_frames_one_by_one(kind):
    inner = make_tokenizer(kind, (8, 12)).eval()
    outer = FrameByFrame.wrap(inner, FRAMES)
    clips = clips_for(inner)
    tokens = outer.encode(clips)
    assert outer.spec.frames == FRAMES and outer.image_shape == (FRAMES, 3, 8, 12) and not outer.training
    assert outer.grid == TokenGrid((FRAMES, *inner.grid.shape), inner.grid.vocab_size)
    decoded = outer.decode(tokens)
    for number in range(FRAMES):
        assert torch.equal(tokens[:, number], inner.encode(clips[:, number]))
        torch.testing.assert_close(decoded[:, number], inner.decode(tokens[:, number]))
    known = torch.rand(2, FRAMES, 8, 12) < 0.97
    found = outer.known_tokens(known)
    for number in range(FRAMES):
        assert torch.equal(found[:, number], inner.known_tokens(known[:, number]))


@pytest.mark.parametrize(
    ("kind", "more"), [("vqvae", {"likelihood": {"kind": "discretized_logistic"}}), ("pixels", {})]
)
def test_the_likelihood_is_that_of_the_frames(kind, more):
    inner = make_tokenizer(kind, (8, 12), 1, **more).eval()
    outer = FrameByFrame.wrap(inner, FRAMES)
    clips = clips_for(inner)
    tokens = outer.encode(clips)
    expected = sum(inner.pixel_log_prob(clips[:, number], tokens[:, number]) for number in range(FRAMES))
    torch.testing.assert_close(outer.pixel_log_prob(clips, tokens), expected)
    values = ((clips + 1) * 127.5).round().long()
    every = outer.value_log_probs(tokens, values, 0).log_softmax(2)
    each = every.gather(2, values).flatten(1).sum(1)
    torch.testing.assert_close(each.float(), expected.float(), rtol=1e-4, atol=1e-2)
    assert outer.reversible == inner.reversible and FrameByFrame.wrap(outer, FRAMES) is outer


def test_a_wrapped_tokenizer_is_saved_with_the_one_that_it_wraps(tmp_path):
    inner = make_tokenizer("vqvae", (8, 12), 5, dtype="uint16", range=(0.0, 4095.0), show=(4, 2, 0)).eval()
    outer = FrameByFrame.wrap(inner, FRAMES)
    clips = clips_for(inner)
    outer.save_pretrained(tmp_path / "it")
    loaded = Tokenizer.from_pretrained(tmp_path / "it")
    assert loaded.config == outer.config and loaded.spec.frames == FRAMES and loaded.config.show == (4, 2, 0)
    assert torch.equal(loaded.encode(clips), outer.encode(clips))
    assert loaded.fingerprint() == outer.fingerprint() != FrameByFrame.wrap(inner, 2).fingerprint()
    assert loaded.tokenizer.fingerprint() == inner.fingerprint(), "the frames' tokenizer is the image tokenizer"
    assert "image_size" not in outer.config.to_dict()["tokenizer"]


@pytest.mark.parametrize("kind", ["titok", "klvae", "pixels"])
def test_other_grids_are_refused(kind):
    with pytest.raises(ConfigError, match="^frame_by_frame: tokenizer: [^\n]*two axes[^\n]*$"):
        FrameByFrame.wrap(make_tokenizer(kind, (8, 12)), FRAMES)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"frames": 1}, "frames"),
        ({"frames": 5}, "image_size"),
        ({"image_size": (24,)}, "tokenizer: .*height"),
        ({"tokenizer": {"kind": "vqvae", "channels": 1}}, "tokenizer.channels"),
        ({"tokenizer": 3}, "tokenizer"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(wrong, key):
    with pytest.raises(ConfigError, match=f"^frame_by_frame: {key}[^\n]*$"):
        Tokenizer.create("frame_by_frame", **{"image_size": (24, 12), "channels": 3, "frames": 3, **wrong})
