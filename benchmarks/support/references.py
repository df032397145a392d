"""Reference models from other libraries, with the sizes of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

Reference = tuple[Any, Callable[[], Any]]
"""A model, and a function that computes its loss on a fixed batch."""


def build_gpt2(sizes: Any, **settings: Any) -> Any:
    """Build GPT-2 with the width, depth, heads and ids of `sizes`, a configuration of our GPT."""
    import transformers

    transformers.logging.set_verbosity_error()
    size = {"n_embd": sizes.dim, "n_layer": sizes.depth, "n_head": sizes.heads}
    config = transformers.GPT2Config(vocab_size=sizes.grid.vocab_size, bos_token_id=0, **size, **settings)
    return transformers.GPT2LMHeadModel(config)


def gpt2(sizes: Any, tokens: Any) -> Reference:
    settings = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "use_cache": False, "eos_token_id": 0}
    model, ids = build_gpt2(sizes, n_positions=len(sizes.grid), **settings).train(), tokens.flatten(1)
    return model, lambda: model(ids, labels=ids).loss


def gpt2_sampler(sizes: Any, device: Any, dtype: Any) -> Callable[..., Any]:
    """Return a function that generates one grid of tokens per image with GPT-2 and its cache. On a GPU, transformers
    compiles a model whose cache is static."""
    size = len(sizes.grid)
    model = build_gpt2(sizes, n_positions=size + 1, eos_token_id=None).to(device, dtype).eval()
    settings = {"max_new_tokens": size, "min_new_tokens": size, "do_sample": True, "top_k": 0, "pad_token_id": 0}

    def generate(count: int, **more: Any) -> Any:
        prompt = torch.zeros(count, 1, dtype=torch.long, device=device)
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings, **more)

    return generate


def build_vq_model(reference: Any, sizes: Any) -> Any:
    """Build the VQGAN of diffusers. reference: widths, blocks and groups. sizes: our tokenizer's configuration."""
    import diffusers

    (widths, blocks, groups), quantizer = reference, sizes.quantizer
    return diffusers.VQModel(
        in_channels=sizes.channels,
        out_channels=sizes.channels,
        block_out_channels=widths,
        layers_per_block=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=quantizer.dim,
        vq_embed_dim=quantizer.dim,
        num_vq_embeddings=quantizer.codes,
        norm_num_groups=groups,
        sample_size=sizes.image_size[0],
    )


def vq_model(reference: Any, sizes: Any, images: Any) -> Reference:
    model = build_vq_model(reference, sizes).train()

    def loss() -> Any:
        output = model(images)
        return functional.mse_loss(output.sample, images) + output.commit_loss

    return model, loss
