"""The header of a model card, which the Hub reads: library, licence, tags, pictures, and figures as a `model-index`.

Written as huggingface_hub's `ModelCardData` reads it. The Hub's documentation: "Model cards" and "Model card metadata".
"""

from __future__ import annotations

import re
from typing import Any

from prior import Prior
from tokenizer import Tokenizer

from ..config.yaml_text import write_yaml
from ..images.origin import describe_for_card

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


def header_of(tokenizer: Tokenizer, prior: Prior, facts: dict[str, Any], figures: dict[str, Any], grid: bool) -> str:
    """The header, with its dashes. facts: `shareable` provenance. figures: those that the card shows, by name. grid:
    whether a picture of samples lies beside the card."""
    source = str(facts.get("data", {}).get("source", ""))
    licence = facts.get("license")
    header: dict[str, Any] = {"library_name": "smalti"}
    if isinstance(licence, str) and re.fullmatch(HUB_LICENCE, licence):
        header["license"] = licence
    if not prior.num_classes:  # the Hub has no task of images of a class, which are not to be found among these
        header["pipeline_tag"] = task_of(prior)
    kind = "class-conditional" if prior.num_classes else "unconditional"
    header["tags"] = ["image-generation", kind, tokenizer.name, prior.name]
    if is_on_hub(source):
        header["datasets"] = [source]
    if grid:
        text = "samples, one class per column" if prior.num_classes else "samples"
        header["widget"] = [{"text": text, "output": {"url": "samples.png"}}]
    if results := results_of(prior, facts, figures):
        name = f"{tokenizer.name} + {prior.name}"
        header["model-index"] = [{"name": name, "results": results}]
    return f"---\n{write_yaml(header)}---"


def is_on_hub(source: str) -> bool:
    """Whether a source is the id of a data set; of `shareable` facts, in which a path is none any more."""
    return bool(re.fullmatch(HUB_DATASET, source))


def task_of(prior: Prior) -> str:
    """What the Hub calls making images like these; it has no name for those of a class."""
    return "class-conditional-image-generation" if prior.num_classes else "unconditional-image-generation"


def results_of(prior: Prior, facts: dict[str, Any], figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a `model-index`: the figures of reconstructions, and those of samples and densities."""
    source = str(facts.get("data", {}).get("source", ""))
    told = describe_for_card(facts) or "images that are not known"
    kind = source if is_on_hub(source) else "digits" if source == "digits" else "imagefolder"
    data = {"name": told.strip("`"), "type": kind, "split": "test"}
    tasks = {"reconstruction": "image-to-image", "generation": task_of(prior)}
    space, results = figures.get("feature_space"), []
    for about, task in tasks.items():
        metrics = []
        for name, (group, label) in METRICS.items():
            value = figures.get(name)
            if group == about and type(value) in (int, float):
                bound = "" if prior.exact or name not in BOUNDED else " (upper bound)"
                label = label.format(space=space) + bound
                metrics.append({"type": name, "value": float(f"{value:.6g}"), "name": f"{label}, held out"})
        if metrics:
            results.append({"task": {"type": task}, "dataset": dict(data), "metrics": metrics})
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
