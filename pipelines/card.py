"""The model card: what a pipeline is, what it was trained on, what was measured, and how to load it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generation import ImagePipeline

FIGURES = {
    "psnr": "PSNR of held-out reconstructions (dB)",
    "codebook_usage": "codebook use on held-out images",
    "codebook_perplexity": "codebook perplexity on held-out images",
    "bits_per_token": "bits per token, held out",
    "marginal_bits_per_token": "bits per token of position frequencies alone",
    "class_agreement": "class agreement of samples (1-nearest-neighbour)",
    "real_class_agreement": "the same classifier on real held-out images",
}


def model_card(pipeline: ImagePipeline) -> str:
    """Markdown with a metadata header; figures come from `pipeline.provenance`, and none is shown that is not there."""
    tokenizer, prior = pipeline.tokenizer, pipeline.prior
    channels, height, width = tokenizer.image_shape
    shape = " x ".join(map(str, prior.grid.shape))
    counts = [sum(p.numel() for p in part.parameters()) for part in (tokenizer, prior)]
    source = pipeline.provenance.get("data", {}).get("source")
    header = [
        "---",
        "library_name: smalti",
        "pipeline_tag: unconditional-image-generation",
        "tags:",
        "- image-generation",
        f"- {tokenizer.name}",
        f"- {prior.name}",
        "---",
    ]
    classes = f"{prior.num_classes} classes ({', '.join(pipeline.labels)})" if prior.num_classes else "no classes"
    lines = [
        f"# {tokenizer.name} + {prior.name}",
        "",
        f"Generates {height} x {width} {'grey' if channels == 1 else 'RGB'} images, {classes}. The tokenizer "
        f"(`{tokenizer.name}`, {counts[0]:,} parameters) turns an image into {shape} ids of {prior.grid.vocab_size}; "
        f"the prior (`{prior.name}`, {counts[1]:,} parameters) models them.",
        "",
        *([f"Trained on `{source}`.", ""] if source else []),
        *(["![samples](samples.png)", ""] if pipeline.sample_grid is not None else []),
        "```python",
        "from pipelines import ImagePipeline",
        'pipe = ImagePipeline.from_pretrained("this folder or Hub id")',
        f"images = pipe(num_images=4{', labels=0' if prior.num_classes else ''}, seed=0).images",
        "```",
        "",
        *measured(pipeline.provenance, exact=prior.exact),
    ]
    return "\n".join([*header, "", *lines])


def measured(provenance: dict[str, Any], *, exact: bool) -> list[str]:
    """A table of the figures of `smalti evaluate`, or of those taken during training while there are no others. exact:
    whether the prior's bits per token are more than a bound."""
    training = [provenance.get(stage, {}) for stage in ("tokenizer", "prior")]
    figures = {name: value for facts in training for name, value in facts.get("evaluation", {}).items()}
    evaluation = provenance.get("evaluation", {})
    rows = {name: (evaluation or figures).get(name) for name in FIGURES}
    bounds = () if exact else ("bits_per_token",)
    lines = [f"| {FIGURES[name]} | {'at most ' * (name in bounds)}{value:.4g} |"
             for name, value in rows.items() if value is not None]  # fmt: skip
    lines += [f"| training of the {stage} | {facts['steps']} steps, {facts['minutes']:.1f} minutes |"
              for stage, facts in zip(("tokenizer", "prior"), training, strict=True) if "steps" in facts]  # fmt: skip
    if not lines:
        return []
    by = "`smalti evaluate`" if evaluation else "training"
    return ["## Measured", "", f"By {by}.", "", "| figure | value |", "|---|---|", *lines, ""]
