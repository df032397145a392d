"""The picture of a search: Frechet distance, class agreement and recall over the strength of guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from prior.sampling import SamplingOptions

from .charts import Chart, Pixels, charts_in_row, lines
from .pages import page
from .tuning import POWER, Trial, course_of, strength

WIDTH, HEIGHT = 460, 330  # of a chart
FIGURES = {
    "frechet_distance": ("Frechet distance", "lower is better"),
    "class_agreement": ("Class agreement", "share of samples"),
    "recall": ("Recall", "share of images"),
}
CEILING = 3.0  # times the lowest distance: what is above it is cut off
Points = list[tuple[float, float]]


def picture(trials: Sequence[Trial], best: Trial, facts: Mapping[str, Any]) -> Pixels:
    """Charts side by side: over the scale of guidance, or that at its end, of trials at temperature 1 without filters;
    where nothing was guided, over temperature."""
    guided = any(trial.stage == "guidance" for trial in trials)
    label = "guidance: constant, or at the last token (1 at the first)" if guided else "temperature"
    series = courses_in(trials) if guided else {"temperature": [t for t in trials if is_temperature(t)]}
    over = (lambda trial: strength(trial.sampler)) if guided else (lambda trial: trial.sampler.temperature)
    chosen = chosen_in(
        series, replace(best.sampler, temperature=1.0, top_k=None, top_p=None) if guided else best.sampler
    )
    charts: list[Chart] = []
    for name, (title, unit) in FIGURES.items():
        found = {course: points(those, over, name) for course, those in series.items()}
        if any(found.values()):
            labels, ceiling = (label, unit), CEILING if name == "frechet_distance" else None
            ringed = dict(zip(["chosen"], points(chosen, over, name), strict=False))
            charts.append(partial(lines, title=title, series=found, labels=labels, ceiling=ceiling, ringed=ringed))
    heading = [
        f"chosen: {facts['told']}",
        f"Frechet distance {facts['frechet_distance']:.3f} (before, {facts['before']}: "
        f"{facts['frechet_distance_before']:.3f}), {best.num_images} samples each, new seeds; curves: "
        f"{trials[0].num_images} samples, {facts['feature_space']}",
        f"{facts['validation_images']:,} {facts['images']}",
    ]
    return page("Sampling settings", heading, [charts_in_row(charts, WIDTH * len(charts), HEIGHT)])


def courses_in(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Those on a course of guidance by what it is in words; constant guidance of 1 is where all begin."""
    names = {"constant": "constant", "linear": "linear", "power-cosine": f"power-cosine {POWER:g}"}
    found: dict[str, list[Trial]] = {name: [] for name in names.values()}
    for trial in filter(is_on_a_course, trials):
        found[names[course_of(trial.sampler)]].append(trial)
    unguided = [trial for trial in found["constant"] if not trial.sampler.guides]
    return {name: those if name == "constant" else unguided + those for name, those in found.items() if those}


def chosen_in(series: Mapping[str, Sequence[Trial]], sampler: SamplingOptions) -> list[Trial]:
    """The trial of these settings, if a curve has it."""
    return [trial for those in series.values() for trial in those if trial.sampler == sampler][:1]


def is_on_a_course(trial: Trial) -> bool:
    """Whether nothing but its guidance is chosen, and that as on the lines of the search: constant, or on from 1."""
    sampler = trial.sampler
    begins = sampler.guidance_end is None or sampler.guidance_scale == 1
    usual = sampler.guidance_power in (None, POWER)
    return sampler.temperature == 1 and not has_filters(sampler) and begins and usual


def has_filters(sampler: SamplingOptions) -> bool:
    """Return whether some ids may be ruled out."""
    return sampler.top_k is not None or sampler.top_p is not None


def is_temperature(trial: Trial) -> bool:
    """Whether nothing but its temperature is chosen."""
    sampler = trial.sampler
    return trial.stage in ("reference", "temperature") and not sampler.guides and not has_filters(sampler)


def points(trials: Sequence[Trial], over: Any, name: str) -> Points:
    """Where the trials lie, ascending; none where they have no such figure."""
    found = [(over(trial), getattr(trial.scores, name)) for trial in trials]
    return sorted({point for point in found if point[1] is not None})
