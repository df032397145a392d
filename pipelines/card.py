"""The model card: what a pipeline is, what it was trained on, what was measured, and how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prior import Prior
from tokenizer import Tokenizer

from .images.origin import describe_for_card, shareable
from .metadata import card_data, run_links

FIGURES = {
    "validation_psnr": "PSNR of reconstructions, validation images (dB)",
    "validation_bits_per_token": "bits per token, validation images",
    "psnr": "PSNR of held-out reconstructions (dB)",
    "ssim": "SSIM of held-out reconstructions",
    "texture_flat": "texture in areas that are flat in the original (RMS, 8-bit levels)",
    "texture_grid": "of it, at periods of 4 and 2 pixels",
    "texture_white": "texture in white areas, black ones where these are the background",
    "codebook_usage": "codebook use on held-out images",
    "codebook_perplexity": "codebook perplexity on held-out images",
    "bits_per_token": "bits per token, held out",
    "marginal_bits_per_token": "bits per token of position frequencies alone",
    "marginal_note": "position frequencies",
    "order_spread": "nats by which log p of an image differs between orders",
    "bits_per_dim": "bits per dim, held out",
    "prior_bits_per_dim": "of these, bits of the tokens",
    "pixel_bits_per_dim": "of these, bits of the pixels given the tokens",
    "class_agreement": "class agreement of samples (1-nearest-neighbour)",
    "real_class_agreement": "the same classifier on real held-out images",
    "feature_space": "features in which samples are judged",
    "feature_origin": "made as",
    "num_compared": "images on each side of the following",
    "frechet_distance": "Frechet distance [{space}] of samples and held-out images",
    "train_frechet_distance": "the same of training images",
    "reconstruction_frechet_distance": "the same of their reconstructions",
    "precision": "precision [{space}] (k = 3)",
    "recall": "recall [{space}] (k = 3)",
    "density": "density [{space}] (k = 5)",
    "coverage": "coverage [{space}] (k = 5)",
    "fid": "FID",
    "fid_protocol": "FID: how",
    "train_fid": "FID of training images",
    "held_out_fid": "FID of held-out images",
    "inception_score": "Inception Score",
    "inception_score_deviation": "its standard deviation over parts",
    "inception_score_protocol": "Inception Score: how",
    "rfid": "FID of reconstructions",
    "rfid_protocol": "FID of reconstructions: how",
    "nearest_ratio": "distance to the nearest training image, as a multiple of held-out images'",
    "nearest_share": "share of samples nearer to one than 99 % of held-out images",
    "copying_z": "copying C_T (z-score; below -3 suggests copies)",
    "reconstruction_copying_z": "the same of held-out reconstructions",
}
OF_SAMPLES = [name for name in list(FIGURES)[list(FIGURES).index("class_agreement") :] if not name.startswith("rfid")]
"""Figures of samples, or beside such, which hold for the settings of sampling that they were taken with."""
TUNING = (
    "settings",
    "before",
    "images",
    "validation_images",
    "num_samples",
    "feature_space",
    "frechet_distance",
    "frechet_distance_before",
    "recall",
    "class_agreement",
)
TUNED = (
    "Sampling settings chosen by `smalti tune` on {validation_images} {images}: {settings}. Frechet distance "
    "[{feature_space}] {frechet_distance} (with the settings before, {before}: {frechet_distance_before}), "
    "recall {recall}"
)
"""What the card says of the facts `TUNING`."""
BOUNDS = ("validation_bits_per_token", "bits_per_token", "bits_per_dim", "prior_bits_per_dim")
"""Where the prior's likelihood is one."""
COUNTS = {
    **dict.fromkeys(("psnr", "codebook_usage", "codebook_perplexity", "bits_per_token", "bits_per_dim"), "num_images"),
    "ssim": "ssim_images",
    "order_spread": "order_spread_images",
    "class_agreement": "num_samples",
    "real_class_agreement": "class_agreement_images",
}
"""The figures that are means over images, and which figure of `smalti evaluate` says over how many."""


TEMPLATE = """\
---
{{ card_data }}
---

# {{ tokenizer.name }} + {{ prior.name }}

Generates {{ height }} x {{ width }} {{ colours }} images, {{ classes }}. The tokenizer (`{{ tokenizer.name }}`, \
{{ counts[0] }} parameters) turns an image into {{ shape }} ids of {{ prior.grid.vocab_size }}; the prior \
(`{{ prior.name }}`, {{ counts[1] }} parameters) models them.
{% if source %}
Trained on {{ source }}.
{% endif %}{% if has_grid %}
![samples](samples.png)
{% endif %}
```python
from pipelines import ImagePipeline
pipe = ImagePipeline.from_pretrained("this folder or Hub id")
images = pipe(num_images=4{{ ", labels=0" if prior.num_classes else "" }}, seed=0).images
```
{% for line in lines %}
{{ line }}{% endfor %}
"""


def model_card(
    tokenizer: Tokenizer, prior: Prior, labels: Sequence[str], provenance: dict[str, Any], has_grid: bool
) -> str:
    """Return markdown with a metadata header; figures come from `provenance`, and none is shown that is not there.
    has_grid: whether a picture of samples lies beside the card."""
    from huggingface_hub import ModelCard

    channels, height, width = tokenizer.image_shape
    facts = shareable(provenance)
    card = ModelCard.from_template(
        card_data(tokenizer, prior, facts, shown_figures(facts), has_grid),
        template_str=TEMPLATE,
        tokenizer=tokenizer,
        prior=prior,
        counts=[f"{sum(p.numel() for p in part.parameters()):,}" for part in (tokenizer, prior)],
        height=height,
        width=width,
        colours="grey" if channels == 1 else "RGB",
        shape=" x ".join(map(str, prior.grid.shape)),
        classes=f"{prior.num_classes} classes ({', '.join(labels)})" if prior.num_classes else "no classes",
        source=describe_for_card(facts),
        has_grid=has_grid,
        lines=[*tuned_lines(facts.get("tuning", {})), *figure_lines(facts, exact=prior.exact), *run_links(facts)],
    )
    return str(card)


def shown_figures(provenance: dict[str, Any]) -> dict[str, Any]:
    """The figures of `smalti evaluate`, or those taken during training while there are no others."""
    if evaluation := provenance.get("evaluation", {}):
        return dict(evaluation)
    stages = [provenance.get(stage, {}) for stage in ("tokenizer", "prior")]
    return {name: value for facts in stages for name, value in facts.get("evaluation", {}).items()}


def figure_lines(provenance: dict[str, Any], *, exact: bool) -> list[str]:
    """A table of the figures of `smalti evaluate`, or of those taken during training while there are no others. exact:
    whether the prior's bits are more than a bound."""
    training = {stage: provenance.get(stage, {}) for stage in ("tokenizer", "prior")}
    counts = {name: count for facts in training.values() for name, count in counts_of(facts).items()}
    evaluation = provenance.get("evaluation", {})
    if evaluation:
        counts = {name: evaluation.get(count) for name, count in COUNTS.items()}
    shown, bounds = shown_figures(provenance), () if exact else BOUNDS
    space = shown.get("feature_space")
    lines = []
    for name, label in FIGURES.items():
        if name in shown:
            of = f", of {count:,}" if type(count := counts.get(name)) is int else ""
            bound = "at most " if name in bounds else ""
            lines.append(f"| {label.format(space=space)} | {bound}{cell(shown[name])}{of} |")
    for stage, facts in training.items():
        if "steps" in facts:
            best = facts.get("best_step")
            kept = f"; the weights of step {best}, best on validation images" if type(best) is int else ""
            lines.append(f"| training of the {stage} | {facts['steps']} steps, {facts['minutes']:.1f} minutes{kept} |")
    if not lines:
        return []
    by = "`smalti evaluate`" if evaluation else "training"
    return ["## Measured", "", f"By {by}.", "", "| figure | value |", "|---|---|", *lines, ""]


def tuned_lines(tuning: dict[str, Any]) -> list[str]:
    """What `smalti tune` says of the settings that it has chosen, if it has."""
    if "settings" not in tuning:
        return []
    said = {name: "?" if tuning.get(name) is None else cell(tuning[name]) for name in TUNING}
    agreed = "" if tuning.get("class_agreement") is None else ", class agreement {class_agreement}"
    line = TUNED + agreed + ". {num_samples} samples of each."
    return [line.format_map(said), ""]


def counts_of(facts: dict[str, Any]) -> dict[str, Any]:
    """Over how many images each figure is a mean that was taken in the training of a stage, where that says so."""
    images = facts.get("images", {})
    if not isinstance(images, dict):
        return {}
    validation = {name: images.get("validation") for name in FIGURES if name.startswith("validation_")}
    return dict.fromkeys(COUNTS, images.get("held_out")) | validation


def cell(value: float | str | None) -> str:
    """A number to four digits, or text that stays within a cell of the table; a dash for what there was none of."""
    if value is None:
        return "-"
    return " ".join(value.replace("|", "/").split()) if isinstance(value, str) else f"{value:.4g}"
