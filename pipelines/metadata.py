"""The header of a model card, which the Hub reads: library, licence, tags, pictures, and figures as a `model-index`.

The Hub's documentation: "Model cards" and "Model card metadata".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from prior import Prior
from tokenizer import Tokenizer

from .images.origin import describe_for_card

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

HUB_DATASET = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
HUB_LICENCE = r"[a-z0-9][a-z0-9.+-]{0,63}"
RUN_LINK = r"https?://[\w.:-]+/[\w./~%-]*"
METRICS = {
    "psnr": ("reconstruction", "PSNR of reconstructions (dB)"),
    "ssim": ("reconstruction", "SSIM of reconstructions"),
    "rfid": ("reconstruction", "FID of reconstructions"),
    "bits_per_dim": ("generation", "bits per dim"),
    "bits_per_token": ("generation", "bits per token"),
    "fid": ("generation", "FID"),
    "inception_score": ("generation", "Inception Score"),
    "frechet_distance": ("generation", "Frechet distance [{space}]"),
    "precision": ("generation", "precision [{space}] (k = 3)"),
    "recall": ("generation", "recall [{space}] (k = 3)"),
    "class_agreement": ("generation", "class agreement of samples (1-nearest-neighbour)"),
}
"""Figures of `smalti evaluate`, or of the end of a training, that are compared between models: what they are of, and
what they are called."""
BOUNDED = ("bits_per_dim", "bits_per_token")


def card_data(
    tokenizer: Tokenizer, prior: Prior, facts: dict[str, Any], figures: dict[str, Any], has_grid: bool
) -> ModelCardData:
    """Return what the header of a card says. facts: `shareable` provenance. figures: those that the card shows, by
    name. has_grid: whether a picture of samples lies beside the card."""
    from huggingface_hub import ModelCardData

    source, licence = str(facts.get("data", {}).get("source", "")), facts.get("license")
    kind = "class-conditional" if prior.num_classes else "unconditional"
    more: dict[str, Any] = {}
    if has_grid:
        text = "samples, one class per column" if prior.num_classes else "samples"
        more["widget"] = [{"text": text, "output": {"url": "samples.png"}}]
    if results := results_of(prior, facts, figures):
        more |= {"model_name": f"{tokenizer.name} + {prior.name}", "eval_results": results}
    return ModelCardData(
        library_name="smalti",
        license=licence if isinstance(licence, str) and re.fullmatch(HUB_LICENCE, licence) else None,
        # The Hub has no task of images of a class, which are not to be found among these.
        pipeline_tag=None if prior.num_classes else task_of(prior),
        tags=["image-generation", kind, tokenizer.name, prior.name],
        datasets=[source] if is_on_hub(source) else None,
        **more,
    )


def is_on_hub(source: str) -> bool:
    """Whether a source is the id of a data set; of `shareable` facts, in which a path is none any more."""
    return bool(re.fullmatch(HUB_DATASET, source))


def task_of(prior: Prior) -> str:
    """What the Hub calls making images like these; it has no name for those of a class."""
    return "class-conditional-image-generation" if prior.num_classes else "unconditional-image-generation"


def results_of(prior: Prior, facts: dict[str, Any], figures: dict[str, Any]) -> list[EvalResult]:
    """Return the results of a `model-index`: the figures of reconstructions, and those of samples and densities."""
    from huggingface_hub import EvalResult

    source = str(facts.get("data", {}).get("source", ""))
    name = (describe_for_card(facts) or "images that are not known").strip("`")
    kind = source if is_on_hub(source) else "digits" if source == "digits" else "imagefolder"
    tasks = {"reconstruction": "image-to-image", "generation": task_of(prior)}
    results = []
    for metric, (group, label) in METRICS.items():
        value = figures.get(metric)
        if type(value) in (int, float):
            bound = "" if prior.exact or metric not in BOUNDED else " (upper bound)"
            title = f"{label.format(space=figures.get('feature_space'))}{bound}, held out"
            number = float(f"{value:.6g}")
            results.append(
                EvalResult(tasks[group], kind, name, metric, number, dataset_split="test", metric_name=title)
            )
    return results


def run_links(facts: dict[str, Any]) -> list[str]:
    """Where the runs of both stages can be looked at, in a line of the card, if that is known."""
    links = []
    for stage in ("tokenizer", "prior"):
        told = facts.get(stage)
        url = told.get("run_url") if isinstance(told, dict) else None
        if isinstance(url, str) and re.fullmatch(RUN_LINK, url):
            links.append(f"[{stage}]({url})")
    return [f"Training runs: {', '.join(links)}.", ""] if links else []
