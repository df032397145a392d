"""A script as a user writes it: type checkers look at it (`make check`), and nobody runs it.

What `assert_type` says is what an editor shows.
"""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines import ImagePipeline, PipelineOutput
from pipelines.images import DataConfig, load_images
from pipelines.tokens import load_tokens
from prior import Prior
from tokenizer import TokenGrid, Tokenizer

# Load
pipe = ImagePipeline.from_pretrained("runs/gpt_digits/pipeline", dtype=torch.bfloat16, device="cpu")
assert_type(pipe, ImagePipeline)
assert_type(pipe.to("cuda"), ImagePipeline)
assert_type(pipe.labels, list[str])
assert_type(Tokenizer.from_pretrained(Path("runs/mine/tokenizer")).grid, TokenGrid)
assert_type(Prior.create("gpt", grid=TokenGrid((7, 7), 128), num_classes=10), Prior)

# Make images
out = pipe(num_images=4, labels=[3, "eight", None, 8], seed=0, temperature=0.9, top_k=50, guidance_scale=2.0)
assert_type(out, PipelineOutput)
assert_type(out.tokens, Tensor)
known = torch.zeros(28, 28, dtype=torch.bool)
assert_type(pipe.complete(out.images, known, labels=8, seed=1), PipelineOutput)

# Between images and tokens
tokens = pipe.encode([Image.new("L", (28, 28))])
assert_type(tokens, Tensor)
pictures: list[Image.Image] = pipe.decode(tokens)
arrays: np.ndarray[Any, Any] = pipe.reconstruct(pictures, output_type="np")

# Score and store
assert_type(pipe.log_prob(pictures, labels=3), Tensor)
assert_type(pipe.embed(arrays), Tensor)
assert_type(pipe.compress(pictures, lossless=True), bytes)
pipe.save_pretrained("my-pipeline")

# A prior by itself
prior = pipe.prior
assert_type(prior.log_prob(tokens, torch.tensor([3])), Tensor)
assert_type(prior.sample(2, torch.tensor([1, 2]), temperature=0.5, generator=torch.Generator()), Tensor)

# Data
splits = load_images(DataConfig(source="digits", image_size=28))
assert_type(splits.train.batch(range(4)), Tensor)
data = load_tokens("runs/digits_tokens")
assert_type(data.splits["train"].given[:4].raw("label"), Tensor)
