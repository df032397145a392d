"""The table of figures, which leaves out what is missing or malformed."""

from __future__ import annotations

import pytest

from pipelines.metrics.figures import OF_SAMPLES, format_report, format_rows

FOUND = {
    "psnr": 25.0039,
    "num_images": 1000,
    "bits_per_token": 2.9914,
    "marginal_bits_per_token": 4.7169,
    "uniform_bits_per_token": 7.0,
    "feature_space": "classifier-64",
    "frechet_distance": 2.385,
    "train_frechet_distance": 1.85,
}


@pytest.mark.parametrize("exact", [True, False])
def test_rows_have_values_and_what_to_compare_them_with(exact):
    bits = f"{'' if exact else 'at most '}2.991"
    rows = [(row.title, row.value, row.beside) for row in format_rows(FOUND, exact=exact)]
    assert rows == [
        ("PSNR of reconstructions", "25.00 dB", "1,000 images"),
        ("bits per token", bits, "position frequencies 4.717; uniform 7.000"),
        ("features", "classifier-64", ""),
        ("Frechet distance [classifier-64]", "2.385", "training images 1.850"),
    ]
    lines = format_report(FOUND, exact=exact).splitlines()
    assert [line.split("  ")[0] for line in lines] == [title for title, _, _ in rows]


def test_unknown_and_malformed_figures_are_harmless():
    """Provenance may be untrusted."""
    assert format_rows({"texture_flat": 2.5, "psnr": None, "ssim": [1], "num_images": 3}, exact=True) == []
    (row,) = format_rows({"psnr": "high", "num_images": "{psnr.__class__}"}, exact=True)
    assert (row.value, row.beside) == ("high", "")


def test_figures_of_samples_depend_on_the_sampling_settings():
    assert {"frechet_distance", "train_recall", "num_samples", "feature_origin", "fid_protocol"} <= OF_SAMPLES
    assert not {"psnr", "ssim", "rfid", "bits_per_token", "num_images"} & OF_SAMPLES
