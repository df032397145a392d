"""The figures of `smalti evaluate` and of a finished training: one table for the printed report, the model card and the
Hub's metadata. Nothing here needs torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..config.table import table


@dataclass(frozen=True)
class Figure:
    """A figure, and what people read of it.

    key: its name in `evaluation.json` and in a pipeline's provenance. title and beside: texts with the values of other
    figures in them; one of `beside` is left out where its figures are missing. task: what the Hub lists it under, if it
    does. bounded: it is an upper bound where the prior's likelihood is one. sampled: it depends on the settings of
    sampling.
    """

    key: str
    title: str
    value: str = "{:.3f}"
    beside: tuple[str, ...] = ()
    better: Literal["higher", "lower", ""] = ""
    task: Literal["reconstruction", "generation", ""] = ""
    bounded: bool = False
    sampled: bool = False


@dataclass(frozen=True)
class Row:
    """A figure in words: what it is, its value, and what that compares to; and its value as it is."""

    figure: Figure
    title: str
    value: str
    beside: str
    raw: Any


def _compared(key: str, digits: str = ".3f") -> tuple[str, str]:
    """What stands beside a figure of samples: that of training images, and that of their reconstructions."""
    return f"training images {{train_{key}:{digits}}}", f"their reconstructions {{reconstruction_{key}:{digits}}}"


FIGURES = {
    figure.key: figure
    for figure in (
        Figure("validation_psnr", "PSNR of validation images", "{:.2f} dB", ("{num_validation:,} images",), "higher"),
        Figure(
            "validation_bits_per_token",
            "bits per token of validation images",
            beside=("{num_validation:,} images",),
            better="lower",
            bounded=True,
        ),
        Figure("psnr", "PSNR of reconstructions", "{:.2f} dB", ("{num_images:,} images",), "higher", "reconstruction"),
        Figure("ssim", "SSIM of reconstructions", "{:.3f}", ("{ssim_images:,} images",), "higher", "reconstruction"),
        Figure("rfid", "FID of reconstructions", "{:.2f}", ("{rfid_protocol}",), "lower", "reconstruction"),
        Figure("codebook_usage", "codebook use", "{:.1%}", ("perplexity {codebook_perplexity:.0f}",), "higher"),
        Figure(
            "bits_per_token",
            "bits per token",
            beside=(
                "position frequencies {marginal_bits_per_token:.3f}",
                "from {marginal_rows:,} training rows",
                "{marginal_note}",
                "uniform {uniform_bits_per_token:.3f}",
            ),
            better="lower",
            task="generation",
            bounded=True,
        ),
        Figure("unconditional_bits_per_token", "bits per token without labels", better="lower", bounded=True),
        Figure(
            "bits_per_dim",
            "bits per dim",
            beside=(
                "+- {bits_per_dim_error:.3f}",
                "tokens {prior_bits_per_dim:.3f}",
                "pixels given the tokens {pixel_bits_per_dim:.3f}",
            ),
            better="lower",
            task="generation",
            bounded=True,
        ),
        Figure(
            "class_agreement",
            "class agreement of samples",
            "{:.1%}",
            (
                "real held-out images {real_class_agreement:.1%}",
                "their reconstructions {reconstruction_class_agreement:.1%}",
                "by the nearest of {class_agreement_known:,} training images",
                "{num_samples:,} samples",
            ),
            better="higher",
            task="generation",
            sampled=True,
        ),
        Figure("samples_per_second", "samples per second", "{:.0f}", ("on {device}",), "higher", sampled=True),
        Figure(
            "fid",
            "FID",
            "{:.2f}",
            ("training images {train_fid:.2f}", "held-out images {held_out_fid:.2f}", "{fid_protocol}"),
            better="lower",
            task="generation",
            sampled=True,
        ),
        Figure(
            "inception_score",
            "Inception Score",
            "{:.2f}",
            ("+- {inception_score_deviation:.2f}", "{inception_score_protocol}"),
            better="higher",
            task="generation",
            sampled=True,
        ),
        Figure("feature_space", "features", "{}", ("{feature_origin}",), sampled=True),
        Figure(
            "frechet_distance",
            "Frechet distance [{feature_space}]",
            beside=(*_compared("frechet_distance"), "all with {num_compared:,} held-out images"),
            better="lower",
            task="generation",
            sampled=True,
        ),
        Figure(
            "precision",
            "precision [{feature_space}] (k = 3)",
            beside=_compared("precision"),
            better="higher",
            task="generation",
            sampled=True,
        ),
        Figure(
            "recall",
            "recall [{feature_space}] (k = 3)",
            beside=_compared("recall"),
            better="higher",
            task="generation",
            sampled=True,
        ),
        Figure(
            "nearest_distance",
            "nearest training image [{feature_space}]",
            beside=("median distance of a sample", "of held-out images {held_out_nearest_distance:.3f}"),
            sampled=True,
        ),
    )
}
OF_SAMPLES = {
    key
    for figure in FIGURES.values()
    if figure.sampled
    for key in (figure.key, *re.findall(r"{(\w+)", " ".join((figure.title, *figure.beside))))
}
"""The keys of all figures that depend on the settings of sampling, or stand beside such."""


def rows_of(figures: Mapping[str, Any], *, exact: bool) -> list[Row]:
    """The figures of the table that are there, in its order. exact: whether the prior's likelihood is no bound."""
    known = {key: value for key, value in figures.items() if isinstance(value, int | float | str)}
    rows = []
    for figure in FIGURES.values():
        if figure.key in known:
            raw, bound = known[figure.key], "at most " if figure.bounded and not exact else ""
            value, title = _fill(figure.value, known, raw) or str(raw), _fill(figure.title, known) or figure.key
            beside = filter(None, (_fill(text, known) for text in figure.beside))
            rows.append(Row(figure, title, bound + value, ", ".join(beside), raw))
    return rows


def _fill(text: str, known: Mapping[str, Any], *value: Any) -> str:
    """The text with its figures, or nothing where one is missing or of another type."""
    try:
        return text.format(*value, **known)
    except (KeyError, TypeError, ValueError):
        return ""


def report(figures: Mapping[str, Any], *, exact: bool) -> str:
    """The figures as a table to print, each with what it compares to."""
    return table([(row.title, row.value, row.beside) for row in rows_of(figures, exact=exact)], right=[1])
