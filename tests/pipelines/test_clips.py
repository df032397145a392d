"""Clips at the pipeline's door: their forms, completion of their first frames, and the bits of a frame."""

import numpy as np
import pytest
import torch
from PIL import Image
from small import make_prior, make_tokenizer
from small_pipelines import LABELS

from pipelines import ImagePipeline
from pipelines.completion import encode_visible
from prior.columns import GridColumn
from tokenizer.frame_by_frame import FrameByFrame

T, H, W = 3, 8, 12


def make_clips(kind="vqvae", prior="gpt", channels=3, sizes=None, labels=LABELS, **config):
    """An untrained pipeline of clips of three frames."""
    tokenizer = FrameByFrame.wrap(make_tokenizer(kind, (H, W), channels, **(sizes or {})).eval(), T)
    config = {"grid": tokenizer.grid, "num_classes": len(labels), "tokenizer": tokenizer.fingerprint(), **config}
    return ImagePipeline(tokenizer, make_prior(prior, **config), labels=labels)


def pixels_for(pipe, count=4):
    """Random uint8 clips `(B, T, C, H, W)`."""
    return torch.randint(0, 256, (count, T, pipe.spec.channels, H, W), dtype=torch.uint8)


def as_pil(clips):
    arrays = (clips[:, :, 0] if clips.shape[2] == 1 else clips.movedim(2, -1)).numpy()
    return [[Image.fromarray(frame) for frame in clip] for clip in arrays]


def as_pixels(clips):
    """The uint8 tensor `(B, T, C, H, W)` of lists of lists of PIL frames."""
    pixels = torch.from_numpy(np.stack([np.stack([np.asarray(frame) for frame in clip]) for clip in clips]))
    return pixels.reshape(*pixels.shape[:4], -1).movedim(-1, 2)


FORMS = {
    "uint8 tensor": lambda clips: clips,
    "float tensor": lambda clips: clips / 127.5 - 1,
    "array": lambda clips: clips.movedim(2, -1).numpy(),
    "lists of PIL images": as_pil,
    "list of lists of arrays": lambda clips: [list(clip.movedim(1, -1).numpy()) for clip in clips],
    "list of tensors": list,
    "list of arrays": lambda clips: list(clips.movedim(2, -1).numpy()),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_clips_has_the_tokens_of_its_frames(form, channels):
    pipe = make_clips(channels=channels)
    clips = pixels_for(pipe)
    expected = torch.stack([pipe.tokenizer.tokenizer.encode(clip / 127.5 - 1) for clip in clips])
    assert pipe.frames == T and torch.equal(pipe.encode(FORMS[form](clips)), expected)
    one = FORMS[form](clips[:1])
    one = one if isinstance(one, list) else one[0]
    assert torch.equal(pipe.encode(one), expected[:1])
    if channels == 1 and form in ("array", "list of arrays"):
        grey = clips[:, :, 0].numpy()
        assert torch.equal(pipe.encode(grey if form == "array" else list(grey)), expected)
        assert torch.equal(pipe.encode(grey[0] if form == "array" else [grey[0]]), expected[:1])


@pytest.mark.parametrize("channels", [1, 3])
def test_every_output_type_shows_the_same_clips(channels):
    pipe = make_clips(channels=channels)
    outs = {kind: pipe(4, [0, 1, 2, None], seed=3, output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    pil, array, tensor, latent = (out.images for out in outs.values())
    assert latent.shape == (4, T, 2, 3) and all(torch.equal(out.tokens, latent) for out in outs.values())
    assert tensor.shape == (4, T, channels, H, W) and array.shape == (4, T, H, W, channels)
    assert torch.equal(as_pixels(pil), torch.from_numpy(array).movedim(-1, 2))
    assert torch.equal(((tensor + 1) * 127.5).round().byte().movedim(2, -1), torch.from_numpy(array))
    for number in range(T):  # a frame is the image of its own tokens
        frame = pipe.tokenizer.tokenizer.decode(latent[:, number])
        torch.testing.assert_close(tensor[:, number], frame)
    again = pipe.reconstruct(tensor, output_type="pt")
    assert torch.equal(again, pipe.decode(pipe.encode(tensor), output_type="pt"))


def test_pictures_show_clips_as_strips():
    pipe = make_clips()
    for kind in ("pil", "np", "pt"):
        out = pipe(4, [0, 0, 1, 1], seed=0, output_type=kind)
        completed = pipe.complete(pixels_for(pipe, 2), frames=1, draws=2, seed=0, output_type=kind)
        assert out.grid().height > 2 * T * H and completed.grid().height > 2 * T * H
    out = pipe(4, seed=0)
    strip = np.asarray(out.grid(columns=4).resize((2 + 4 * 62, out.grid(columns=4).height)))[2:-2, 2:62]
    expected = np.concatenate([np.asarray(frame) for frame in out.images[0]]).repeat(5, 0).repeat(5, 1)
    assert np.array_equal(strip, expected)
    assert pipe.sample_picture(4).shape[0] > T * H


def test_clips_are_not_images_and_images_are_not_clips():
    pipe = make_clips()
    clips = pixels_for(pipe)
    for wrong in (clips[:, :2], clips[..., 1:], as_pil(clips)[0], as_pil(clips)[0][0]):
        with pytest.raises(ValueError, match="frames"):
            pipe.encode(wrong)
    tokenizer = make_tokenizer("vqvae", (H, W), 3).eval()
    images = ImagePipeline(tokenizer, make_prior("gpt", grid=tokenizer.grid, num_classes=0))
    with pytest.raises(ValueError, match="^images must be PIL"):
        images.encode(clips)
    with pytest.raises(ValueError, match="^frames: this pipeline makes images, not clips"):
        images.complete(clips[0], frames=1)


def test_clips_are_not_cut_into_tiles():
    pipe = make_clips()
    clips = pixels_for(pipe)
    for call in (lambda: pipe.compress(clips, tile=True), lambda: pipe.reconstruct(clips, stride=4)):
        with pytest.raises(ValueError, match="^tile: clips are not cut into tiles$"):
            call()


# Completion


@pytest.mark.parametrize(
    ("prior", "more"), [("gpt", {}), ("gpt", {"window": (1, 1, 1)}), ("masked", {}), ("blocks", {})]
)
def test_clips_continue_from_their_first_frames(prior, more):
    kept = 2
    pipe = make_clips(prior=prior, **more)
    clips = pixels_for(pipe)
    other = clips.clone()
    other[:, kept:] = 255 - other[:, kept:]
    one, two = (pipe.complete(each, frames=kept, draws=2, seed=0, output_type="np") for each in (clips, other))
    assert torch.equal(one.tokens, two.tokens) and np.array_equal(one.images, two.images), "later frames leak"
    assert np.array_equal(one.images[:, 0, :kept], clips[:, :kept].movedim(2, -1).numpy())
    assert torch.equal(one.tokens[:, 0, :kept], pipe.encode(clips)[:, :kept])
    assert not torch.equal(one.tokens[:, 0], one.tokens[:, 1])
    known = torch.zeros(T, H, W, dtype=torch.bool)
    known[:kept] = True
    for how in ({"known": known}, {"mask": ~known.expand(4, -1, -1, -1)}):
        assert torch.equal(pipe.complete(clips, draws=2, seed=0, output_type="latent", **how).tokens, one.tokens)


def test_paint_does_not_cross_from_frame_to_frame():
    """A frame with a hole is painted from its own pixels."""
    pipe = make_clips()
    clips = pixels_for(pipe, 2)
    known = torch.ones(T, H, W, dtype=torch.bool)
    known[1, :3] = False  # below the last rows of the first frame
    other = clips.clone()
    other[:, 0] = 255 - other[:, 0]
    both = [pipe.complete(each, known, seed=0, output_type="latent").tokens[:, 2] for each in (clips, other)]
    assert torch.equal(*both)
    keep = known.expand(2, -1, -1, -1)
    one, two = (encode_visible(pipe, pipe.to_images(each), keep)[0] for each in (clips, other))
    assert torch.equal(one[:, 1], two[:, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"frames": T}, ValueError, "from 1 to 2"),
        ({"frames": 1, "known": torch.ones(T, H, W).bool()}, TypeError, "frames"),
        ({"known": torch.ones(H, W).bool()}, ValueError, "shape"),
        ({"mask": Image.new("L", (W, H))}, ValueError, "pictures"),
    ],
)
def test_other_numbers_of_frames_and_masks_are_refused(arguments, error, word):
    pipe = make_clips()
    for call in (pipe.complete, pipe.conditional_log_prob):
        with pytest.raises(error, match=word):
            call(pixels_for(pipe), **arguments)


# Scores and vectors


def test_maps_scores_and_vectors_of_clips():
    pipe = make_clips(labels=[])
    clips = pixels_for(pipe, 45)
    bits = pipe.anomaly_map(clips)
    assert bits.shape == (45, T, H, W)
    torch.testing.assert_close(bits.flatten(1).sum(1), pipe.anomaly_score(clips, "nll").float(), rtol=1e-4, atol=1e-3)
    pipe.calibrate(clips[5:])
    assert pipe.anomaly_score(clips[:5]).shape == (5,)
    healed = pipe.heal(clips[:2], draws=2)
    assert healed.images.shape == (2, T, 3, H, W) and healed.difference.shape == (2, T, H, W)
    assert torch.equal(pipe.decode(healed.tokens, output_type="pt"), healed.images)
    for layer in (None, "codes", "pixels", "embeddings"):
        vectors = pipe.embed(clips[:6], layer=layer)
        assert pipe.nearest(clips[:3], vectors, layer=layer)[0].flatten().tolist() == [0, 1, 2]
    codes = pipe.tokenizer.tokenizer.quantizer.lookup(pipe.encode(clips[:1])[0])
    assert torch.equal(pipe.embed(clips[:1], layer="embeddings", pool="mean")[0], codes.mean((0, 2, 3)))


def test_streams_hold_clips():
    pytest.importorskip("constriction")
    pipe = make_clips("pixels", channels=1, sizes={"levels": 256})
    clips = pixels_for(pipe, 2)
    assert torch.equal(as_pixels(pipe.decompress(pipe.compress(clips, lossless=True))), clips)
    lossy = make_clips()
    clips = pixels_for(lossy, 2)
    back = lossy.decompress(lossy.compress(as_pil(clips)), output_type="pt")
    assert torch.equal(back, lossy.reconstruct(clips, output_type="pt"))
    with pytest.raises(ValueError, match="frames"):
        lossy.compress(as_pil(clips)[0])


def test_a_clip_may_be_the_condition_of_a_clip():
    """In the forms of clips at the door."""
    other = FrameByFrame.wrap(make_tokenizer("vqvae", (H, W), 1).eval(), T)
    column = GridColumn(grid=other.grid, tokenizer=other.fingerprint())
    base = make_clips()
    prior = make_prior("gpt", grid=base.tokenizer.grid, num_classes=0, conditions={"before": column})
    pipe = ImagePipeline(base.tokenizer, prior, condition_tokenizers={"before": other})
    clips = torch.randint(0, 256, (2, T, 1, H, W), dtype=torch.uint8)
    outs = [
        pipe(2, condition={"before": form}, seed=0).tokens
        for form in (clips, list(clips), other.encode(clips / 127.5 - 1))
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    one = pipe(2, condition={"before": clips[0]}, seed=0).tokens
    assert torch.equal(one[0], outs[0][0])
