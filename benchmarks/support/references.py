"""Reference models from other libraries, with the sizes of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Reference = tuple[Any, Callable[[], Any]]
"""A model, and a function that computes its loss on a fixed batch."""


def gpt2(sizes: Any, tokens: Any) -> Reference:
    """Build GPT-2 with the width, depth and heads of `sizes`, a configuration of our GPT."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        vocab_size=sizes.grid.vocab_size,
        n_positions=len(sizes.grid),
        n_embd=sizes.dim,
        n_layer=sizes.depth,
        n_head=sizes.heads,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model, ids = transformers.GPT2LMHeadModel(config).train(), tokens.flatten(1)
    return model, lambda: model(ids, labels=ids).loss


def vq_model(reference: Any, sizes: Any, images: Any) -> Reference:
    """Build the VQGAN of diffusers. reference: widths, blocks and groups."""
    import diffusers
    from torch.nn import functional

    (widths, blocks, groups), quantizer = reference, sizes.quantizer
    model = diffusers.VQModel(
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
    ).train()

    def loss() -> Any:
        output = model(images)
        return functional.mse_loss(output.sample, images) + output.commit_loss

    return model, loss
