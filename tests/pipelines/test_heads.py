"""A pipeline works with priors whose output head draws several ids per position."""

import pytest
import torch
from small_pipelines import make_pipeline, pixels_for

from pipelines import ImagePipeline

RVQ = {"quantizer": {"kind": "rvq", "depth": 3, "book": {"kind": "ema", "codes": 32, "dim": 8}}}
LFQ = {"quantizer": {"kind": "lfq", "bits": 8, "levels": 2}}
CASES = {
    "levels": ("vqvae", RVQ, "gpt", {"head": "depth"}),
    "levels in blocks": ("vqvae", LFQ, "blocks", {"head": "depth", "order": "diagonal"}),
    "bins": ("klvae", {}, "gpt", {"head": "depth", "order": "snake"}),
    "bins fitted later": ("posthoc", {}, "gated_pixelcnn", {"head": "depth"}),
    "pixels in colour": ("pixels", {"levels": 256}, "gpt", {"head": "logistic"}),
    "grey pixels": ("pixels", {"levels": 256}, "causal_conv", {"head": "logistic"}),
}
every_case = pytest.mark.parametrize("case", CASES)


def make(case):
    torch.manual_seed(0)
    tokenizer, sizes, prior, config = CASES[case]
    channels = 3 if case == "pixels in colour" else 1
    return make_pipeline(tokenizer, prior, channels, sizes=sizes, **config)


@every_case
def test_images_are_sampled_completed_scored_embedded_and_the_pipeline_is_saved(case, tmp_path):
    pipe = make(case)
    images = pixels_for(pipe, 3)
    drawn = pipe(2, labels=["cat", "dog"], seed=3, output_type="pt", progress=False)
    alone = pipe(1, labels=["dog"], seed=4, output_type="pt", progress=False)
    assert torch.equal(drawn.tokens[1:], alone.tokens) and drawn.images.shape[1:] == pipe.tokenizer.image_shape

    known = torch.zeros(pipe.tokenizer.image_shape[1:], dtype=torch.bool)
    known[:4] = True
    completed = pipe.complete(images, known, seed=0, output_type="pt", progress=False)
    shown = ((completed.images + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(shown[:, :, :4], images[:, :, :4]) and not torch.equal(shown[:, :, 4:], images[:, :, 4:])

    tokens = pipe.encode(images)
    total = pipe.prior.log_prob(tokens)
    assert torch.allclose(pipe.prior.token_log_probs(tokens).flatten(1).sum(1), total, atol=1e-4)
    assert pipe.anomaly_map(images).shape == (3, *pipe.tokenizer.image_shape[1:])
    assert torch.isfinite(pipe.anomaly_score(images, method="nll")).all()
    assert pipe.embed(images, pool="last").shape == pipe.embed(images).shape
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert loaded.prior.grid == loaded.tokenizer.grid and loaded.prior.fingerprint() == pipe.prior.fingerprint()
    again = loaded(2, labels=["cat", "dog"], seed=3, output_type="pt", progress=False)
    assert torch.equal(again.tokens, drawn.tokens)
