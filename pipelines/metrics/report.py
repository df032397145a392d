"""The figures of `smalti evaluate` as people read them."""

from __future__ import annotations

from typing import Any

from ..config.table import table
from .likelihood import ORDERS
from .quality import LEAST
from .texture import in_levels

Figures = dict[str, Any]


def report(figures: Figures, *, exact: bool, vocab_size: int, num_images: int, device: str) -> str:
    """A table of the figures, each with what it should be compared to. exact: whether likelihoods are no bounds;
    num_images: how many are held out."""
    f, at_most = figures, "" if exact else "<= "
    rows = [("held-out PSNR", f"{f['psnr']:.2f} dB", f"{num_images:,} images, as all but where another number is")]
    if "ssim" in f:
        rows.append(("  SSIM", f"{f['ssim']:.3f}", f"{f['ssim_images']:,} images"))
    rows += texture_rows(f)
    used = f"{f['codebook_usage']:.1%} of {vocab_size}"
    rows.append(("codebook use", used, f"perplexity {f['codebook_perplexity']:.0f}"))
    beside = f"uniform {f['uniform_bits_per_token']:.3f}"
    if "marginal_bits_per_token" in f:
        note = f" ({f['marginal_note']})" if "marginal_note" in f else ""
        beside = f"position frequencies {f['marginal_bits_per_token']:.3f}{note}, {beside}"
    rows.append(("bits per token", f"{at_most}{f['bits_per_token']:.3f}", beside))
    rows.append(("  without labels", f"{at_most}{f['unconditional_bits_per_token']:.3f}", ""))
    if "order_spread" in f:
        beside = f"nats that log p of an image differs by between {ORDERS} orders; {f['order_spread_images']:,} images"
        rows.append(("  spread over orders", f"{f['order_spread']:.2f}", beside))
    if "bits_per_dim" in f:
        parts = f"tokens {f['prior_bits_per_dim']:.3f} + pixels given the tokens {f['pixel_bits_per_dim']:.3f}"
        beside = f"+- {f['bits_per_dim_error']:.3f}; {parts}"
        rows.append(("bits per dim", f"{at_most}{f['bits_per_dim']:.3f}", beside))
    else:
        rows.append(("bits per dim", "none", "this decoder has no likelihood"))
    rows += sample_rows(f, device)
    return table(rows, right=[1])


def texture_rows(f: Figures) -> list[tuple[str, str, str]]:
    """The rows of the table about texture, a dash where no window is flat."""
    if "texture_flat" not in f:
        return []
    return [
        (
            "  texture in flat areas",
            f"{in_levels(f['texture_flat'])} levels",
            f"at periods 4 and 2 {in_levels(f['texture_grid'])}; {f['texture_flat_windows']:,} windows of 8 x 8",
        ),
        (
            f"  in {f['texture_background']} areas",
            f"{in_levels(f['texture_white'])} levels",
            f"{f['texture_white_windows']:,} windows",
        ),
    ]


def sample_rows(f: Figures, device: str) -> list[tuple[str, str, str]]:
    """The rows of the table about samples."""
    rows = []
    if "class_agreement" in f:
        compared = (
            f"of {f['num_samples']:,} samples; {f['class_agreement_images']:,} real held-out images "
            f"{f['real_class_agreement']:.1%}, their reconstructions {f['reconstruction_class_agreement']:.1%}"
        )
        if "class_agreement_known" in f:
            compared += f"; by {f['class_agreement_known']:,} training images"
        rows.append(("class agreement", f"{f['class_agreement']:.1%}", compared))
    if "samples_per_second" in f:
        rows += [("samples per second", f"{f['samples_per_second']:.0f}", f"on {device}")]
    rows += inception_rows(f)
    if "feature_space" not in f:
        return [*rows, ("Frechet distance", "none", f"needs {LEAST} samples, training images and held-out images")]

    def beside(name: str) -> str:
        return f"training images {f['train_' + name]:.3f}, their reconstructions {f['reconstruction_' + name]:.3f}"

    rows += [
        ("features", f["feature_space"], f["feature_origin"]),
        (
            f"Frechet distance [{f['feature_space']}]",
            f"{f['frechet_distance']:.3f}",
            f"{beside('frechet_distance')}; all with {f['num_compared']:,} held-out images",
        ),
    ]
    rows += [(f"  {name}", f"{f[name]:.3f}", beside(name)) for name in ("precision", "recall", "density", "coverage")]
    return [
        *rows,
        (
            "nearest training image",
            f"{f['nearest_ratio']:.2f} x",
            "as far as from held-out images (medians); "
            f"{f['nearest_share']:.1%} of samples are nearer than 99% of these",
        ),
        (
            "copying C_T",
            f"{f['copying_z']:+.1f}",
            "below -3 suggests copies, above 3 samples unlike the data; "
            f"held-out reconstructions {f['reconstruction_copying_z']:+.1f}",
        ),
    ]


def inception_rows(f: Figures) -> list[tuple[str, str, str]]:
    """The rows of what Inception says, each with how it was taken."""
    rows = []
    if "fid" in f:
        real = "training" if "train_fid" in f else "held-out"
        value = f["train_fid"] if "train_fid" in f else f["held_out_fid"]
        rows.append(("FID", f"{f['fid']:.2f}", f"{real} images {value:.2f}; {f['fid_protocol']}"))
    if "inception_score" in f:
        beside = f"+- {f['inception_score_deviation']:.2f}; {f['inception_score_protocol']}"
        rows.append(("Inception Score", f"{f['inception_score']:.2f}", beside))
    if "rfid" in f:
        rows.append(("FID of reconstructions", f"{f['rfid']:.2f}", f["rfid_protocol"]))
    return rows
