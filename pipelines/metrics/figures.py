"""The figures of `smalti evaluate` and of training, in one table for the printed report, the model card and the Hub's
metadata. This module does not import torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..config.table import table


@dataclass(frozen=True)
class Figure:
    """A figure and how it is displayed.

    key: its name in `evaluation.json` and in a pipeline's provenance. of: what it measures; figures of `samples` depend
    on the sampling settings. title and beside are templates that may refer to other figures; beside is a list separated
    by semicolons, and items whose figures are missing are left out. better: which direction is better; figures without
    a direction are not in the metadata of the Hub.
    """

    key: str
    title: str
    value: str
    better: Literal["higher", "lower", ""]
    of: Literal["validation", "reconstruction", "likelihood", "samples"]
    beside: str = ""

    @property
    def is_bits(self) -> bool:
        """Whether the figure is an upper bound if the prior only bounds the likelihood."""
        return "bits_per_" in self.key or self.key == "nats_per_image"


DIVISION = "division"
"""Key of what has changed since the images were divided, or is not known: images may have been trained on."""
_BESIDE = "training images {{train_{0}:.3f}}; their reconstructions {{reconstruction_{0}:.3f}}"
_BITS_PER_TOKEN = (
    "position frequencies {marginal_bits_per_token:.3f}; from {marginal_rows:,} training rows; {marginal_note}; "
    "uniform {uniform_bits_per_token:.3f}"
)
_CLASS_UNKNOWN = "null class {null_class_bits_per_token:.3f}; {class_unknown_rows:,} images; {class_unknown_note}"
_FRAMES = "from the first: {frame_bits}"
_BITS_PER_DIM = (
    "+- {bits_per_dim_error:.3f}; tokens {prior_bits_per_dim:.3f}; pixels given the tokens {pixel_bits_per_dim:.3f}"
)
_NATS = "+- {nats_per_image_deviation:.3f} over {draws} draws of the pixels"
_AGREEMENT = (
    "real held-out images {real_class_agreement:.1%}; their reconstructions {reconstruction_class_agreement:.1%}; "
    "{num_samples:,} samples; by {class_agreement_known:,} training images"
)
_VALIDATION = "{num_validation:,} images"
_FID = "training images {train_fid:.2f}; held-out images {held_out_fid:.2f}; {fid_protocol}"
_SCORE = "+- {inception_score_deviation:.2f}; {inception_score_protocol}"
_FRECHET = _BESIDE.format("frechet_distance") + "; all with {num_compared:,} held-out images"
_PRECISION, _RECALL = _BESIDE.format("precision"), _BESIDE.format("recall")
_NEAREST = "median distance of a sample; of held-out images {held_out_nearest_distance:.3f}"

TABLE = (
    Figure("validation_psnr", "validation PSNR", "{:.2f} dB", "higher", "validation", _VALIDATION),
    Figure("validation_bits_per_token", "validation bits per token", "{:.3f}", "lower", "validation", _VALIDATION),
    Figure("psnr", "PSNR of reconstructions", "{:.2f} dB", "higher", "reconstruction", "{num_images:,} images"),
    Figure("ssim", "SSIM of reconstructions", "{:.3f}", "higher", "reconstruction", "{ssim_images:,} images"),
    Figure("rfid", "FID of reconstructions", "{:.2f}", "lower", "reconstruction", "{rfid_protocol}"),
    Figure("codebook_usage", "codebook use", "{:.1%}", "", "reconstruction", "perplexity {codebook_perplexity:.0f}"),
    Figure("bits_per_token", "bits per token", "{:.3f}", "lower", "likelihood", _BITS_PER_TOKEN),
    Figure("unconditional_bits_per_token", "bits per token, no labels", "{:.3f}", "", "likelihood"),
    Figure("class_unknown_bits_per_token", "bits per token, class unknown", "{:.3f}", "", "likelihood", _CLASS_UNKNOWN),
    Figure("bits_per_frame", "bits per frame given its past", "{:.1f}", "lower", "likelihood", _FRAMES),
    Figure("bits_per_dim", "bits per dim", "{:.3f}", "lower", "likelihood", _BITS_PER_DIM),
    Figure("nats_per_image", "nats per image", "{:.2f}", "lower", "likelihood", _NATS),
    Figure("class_agreement", "class agreement (nearest image)", "{:.1%}", "higher", "samples", _AGREEMENT),
    Figure("samples_per_second", "samples per second", "{:.0f}", "", "samples", "on {device}"),
    Figure("fid", "FID", "{:.2f}", "lower", "samples", _FID),
    Figure("inception_score", "Inception Score", "{:.2f}", "higher", "samples", _SCORE),
    Figure("feature_space", "features", "{}", "", "samples", "{feature_origin}"),
    Figure("frechet_distance", "Frechet distance [{feature_space}]", "{:.3f}", "lower", "samples", _FRECHET),
    Figure("precision", "precision [{feature_space}] (k = 3)", "{:.3f}", "higher", "samples", _PRECISION),
    Figure("recall", "recall [{feature_space}] (k = 3)", "{:.3f}", "higher", "samples", _RECALL),
    Figure("nearest_distance", "nearest training image", "{:.3f}", "", "samples", _NEAREST),
)
WITHOUT = "bits_per_token_without_"
"""Prefix of the figures of a prior with columns that is not given one of its conditions."""
_SHUFFLED = Figure("shuffled_bits_per_token", "bits per token, conditions of other images", "{:.3f}", "", "likelihood")
OF_SAMPLES = {
    key
    for figure in TABLE
    if figure.of == "samples"
    for key in (figure.key, *re.findall(r"{(\w+)", figure.title + figure.beside))
}
"""The keys of all figures that depend on the sampling settings, and of the figures printed beside them."""


@dataclass(frozen=True)
class FormattedFigure:
    """A figure as text, with its title, figures to compare with, and its raw value."""

    figure: Figure
    title: str
    value: str
    beside: str
    raw: Any


def format_rows(figures: Mapping[str, Any], *, exact: bool) -> list[FormattedFigure]:
    """Return the figures of the table that are present, in its order. exact: whether the prior's likelihood is exact,
    not a bound."""
    known = {key: value for key, value in figures.items() if isinstance(value, int | float | str)}
    if isinstance(each := figures.get("frame_bits"), list):
        known["frame_bits"] = ", ".join(f"{bits:.0f}" for bits in each if isinstance(bits, int | float))
    rows = []
    for figure in list_figures(known):
        if figure.key in known:
            raw, bound = known[figure.key], "at most " if figure.is_bits and not exact else ""
            value, title = _fill(figure.value, known, raw) or str(raw), _fill(figure.title, known) or figure.key
            beside = filter(None, (_fill(text, known) for text in figure.beside.split("; ")))
            rows.append(FormattedFigure(figure, title, bound + value, "; ".join(beside), raw))
    return rows


def list_figures(known: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the table and, after the bits per token without conditions, those of a prior with columns."""
    names = [found[1] for key in known if (found := re.fullmatch(rf"{WITHOUT}(\w{{1,64}})", key))]
    for figure in TABLE:
        if figure.key == "unconditional_bits_per_token" and names:
            yield replace(figure, title="bits per token, no conditions")
            for name in names:
                yield Figure(f"{WITHOUT}{name}", f"bits per token, no {name}", "{:.3f}", "", "likelihood")
            yield _SHUFFLED
        else:
            yield figure
        if figure.key == "class_unknown_bits_per_token":
            yield from list_inferred(known)


def list_inferred(known: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield how well each column is inferred."""
    for key in known:
        if found := re.fullmatch(r"inferred_(\w{1,64})_(accuracy|error)", key):
            name, kind = found.groups()
            if kind == "error" and f"inferred_{name}_log_score" not in known:
                continue  # `NAME_calibration_error` of the column NAME
            of = f"inferred_{name}"
            beside = (
                f"log score {{{of}_log_score:.3f}}; calibration error {{{of}_calibration_error:.3f}}; "
                f"sets at 90 % contain {{{of}_coverage:.1%}}; {{{of}_rows:,}} images"
            )
            shown = ("{:.1%}", "higher") if kind == "accuracy" else ("{:.4g}", "lower")
            title = f"{name} inferred" if kind == "accuracy" else f"{name} inferred, mean error"
            yield Figure(key, title, *shown, "likelihood", beside)  # type: ignore[arg-type]


def _fill(text: str, known: Mapping[str, Any], *value: Any) -> str:
    """Fill in a template; empty if a figure is missing or has the wrong type."""
    try:
        return text.format(*value, **known)
    except (KeyError, TypeError, ValueError):
        return ""


def format_report(figures: Mapping[str, Any], *, exact: bool) -> str:
    text = table([(row.title, row.value, row.beside) for row in format_rows(figures, exact=exact)], right=[1])
    return f"{text}\n\n{figures[DIVISION]}" if DIVISION in figures else text
