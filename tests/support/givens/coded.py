"""Small pipelines for compression, and images."""

import torch
from small import node_of
from small_pipelines import make_pipeline

LOGISTIC = {"likelihood": {"kind": "discretized_logistic", "components": 2}}
# Tokenizer, settings, and whether lossless compression is possible, by what a stream codes.
KINDS = {
    "tokens": ("vqvae", {}, False),
    "pixels given tokens": ("vqvae", LOGISTIC, True),
    "pixels given levels": ("pixels", {"levels": 5}, True),
    "bytes": ("pixels", {"levels": 256}, True),
    "levels": ("vqvae", {"quantizer": node_of("rvq")}, False),
}


def pipeline_of(kind="tokens", prior="gpt", size=(8, 8), channels=1, **config):
    name, settings, _ = KINDS[kind]
    torch.manual_seed(0)
    return make_pipeline(name, prior, channels, size=size, labels=[], sizes=settings, **{"num_classes": 3, **config})


def images_of(pipe, count=9, seed=0):
    shape = (count, *pipe.tokenizer.image_shape)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
