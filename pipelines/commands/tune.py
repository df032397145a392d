"""Tune the sampling settings on validation images, and store the best settings in the pipeline."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from prior.options import SamplingOptions
from tokenizer.files import require_replaceable, write_json

from ..config import OutputConfig, UserError, run_command
from ..evaluate import check_classes, choose_given, draw_samples, load_training_tokens
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images import ImageDataset
from ..images.origin import describe_source
from ..images.pictures import write_picture
from ..metrics.charts import BLUE, INK, Pixels, render
from ..metrics.figures import OF_SAMPLES
from ..metrics.frechet import distance, moments
from ..metrics.quality import feature_space, fixed_permutation
from ..options import UsesImages
from ..provenance import defaults
from ..saving import PIPELINE, save_again

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULTS = "defaults"  # of sampling
LEAST_VALIDATION, FEW_VALIDATION = 30, 300
GUIDANCE_GRID = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
RISING = (2.0, 3.0, 4.0)  # guidance at the last token, 1 at the first
TEMPERATURES = (0.85, 0.92, 1.0, 1.08, 1.16)
TOP_P = (1.0, 0.98, 0.95, 0.9)

Changes = dict[str, dict[str, dict[str, Any]]]
"""The options to change, by setting and value."""


class TuneConfig(UsesImages, OutputConfig):
    examples = ("pipeline=runs/gpt_digits/pipeline",)
    often = "pipeline out overwrite num_samples store data.source device"

    out: str | None = Field(
        None, description="folder for tuning.json and tuning.png; default: `tuning` beside the pipeline folder"
    )
    num_samples: int = Field(1000, ge=50, description="samples per setting; fewer make the choice noisier")
    feature_steps: int = Field(300, ge=0, description="training steps of the classifier of the features")
    tokens: str | None = Field(None, description="token dataset for columns; default: the prior's training tokens")
    seed: int = Field(0, ge=0, lt=1 << 63, description="sample k uses seed + k, for every setting")
    store: bool = Field(True, description="store the best settings in the pipeline folder; false: only report them")


@dataclass(frozen=True)
class Trial:
    """A value of a setting, the full options, and the Frechet distance of their samples to the validation images."""

    setting: str
    value: str
    options: SamplingOptions
    frechet_distance: float


def run(config: TuneConfig) -> dict[str, Any]:
    """Search, print each trial, write the results, store the best settings, and return the content of `tuning.json`."""
    folder = Path(config.pipeline)
    if config.store and not folder.is_dir():
        raise UserError(
            f"pipeline: {config.pipeline!r} is not a folder to store settings in; set store=false to only report them"
        )
    if config.store:
        require_replaceable(folder, PIPELINE)
    out = Path(config.out or folder.parent / "tuning")
    output = Output(out, [config.pipeline, config.data.path], config.overwrite)
    output.check_files(["tuning.json", "tuning.png"])
    with lock_output(out), lock_output(folder if config.store else None, key="pipeline"):
        pipeline = config.load_pipeline()
        train, validation = load_validation_images(config, pipeline)
        tokens = load_training_tokens(config.tokens, pipeline) if pipeline.prior.config.conditions else {}
        given = choose_given(pipeline, tokens, train, config.num_samples)
        source = describe_source(config.data.source)
        space = feature_space(train, validation, config.feature_steps, source)
        real = moments(space.of(validation, fixed_permutation(len(validation))))

        def sample_distance(options: SamplingOptions) -> float:
            pipeline.sampler = options  # seeds and conditions stay, so that differences of options are less noisy
            samples = draw_samples(pipeline, given, config.seed)
            return distance(moments(samples.rows(space, config.num_samples)), real)

        trials = try_settings(sample_distance, pipeline.sampler, list_settings(pipeline))
        before, best = trials[0], find_best(trials)
        facts = {
            "settings": best.options.describe() or DEFAULTS,
            "before": before.options.describe() or DEFAULTS,
            "images": f"validation images of {source}",
            "validation_images": len(validation),
            "num_samples": config.num_samples,
            "feature_space": space.name,
            "feature_origin": space.origin,
            "frechet_distance": best.frechet_distance,
            "frechet_distance_before": before.frechet_distance,
        }
        found = facts | {"trials": [asdict(trial) for trial in trials]}
        with output.files() as results:
            write_json(results / "tuning.json", found)
            write_picture(draw_trials(trials), results / "tuning.png")
        print(f"\nbest: {facts['settings']}; figures and chart: {out}")
        if config.store:
            pipeline.sampler = best.options
            pipeline.provenance = {**pipeline.provenance, "tuning": facts}
            if best.options != before.options and "evaluation" in pipeline.provenance:  # of other samples
                figures: dict[str, Any] = pipeline.provenance["evaluation"]
                pipeline.provenance["evaluation"] = {k: v for k, v in figures.items() if k not in OF_SAMPLES}
            save_again(pipeline, folder, None if pipeline.sample_grid is None else pipeline.sample_picture())
            print(f"{config.pipeline} now samples with these settings")
    return found


def load_validation_images(config: TuneConfig, pipeline: ImagePipeline) -> tuple[ImageDataset, ImageDataset]:
    """Return training images, for the classifier, and validation images, never the held-out ones of `evaluate`."""
    images = config.load_images(pipeline, "validation")
    count = 0 if images.validation is None else len(images.validation)
    if images.validation is None or count < LEAST_VALIDATION:
        raise UserError(
            f"data: needs at least {LEAST_VALIDATION} validation images (got {count}); train again with "
            "data.validation_fraction=0.2, or give other images (data.source=FOLDER data.validation_fraction=0.5)"
        )
    if count < FEW_VALIDATION:
        print(f"warning: with {count} validation images, small differences are noise", file=sys.stderr)
    check_classes(pipeline, images.train, images.validation)
    return images.train, images.validation


def list_settings(pipeline: ImagePipeline) -> Changes:
    """Return the settings to try, in order."""
    settings: Changes = {}
    if pipeline.columns:
        scales: dict[str, Any] = {f"{scale:g}": (scale, None) for scale in GUIDANCE_GRID}
        scales |= {f"1 to {end:g}": (1, end) for end in RISING}
        settings["guidance"] = {
            value: {"guidance_scale": scale, "guidance_end": end, "guidance_power": None}
            for value, (scale, end) in scales.items()
        }
    settings["temperature"] = {f"{value:g}": {"temperature": value} for value in TEMPERATURES}
    settings["top-p"] = {f"{value:g}": {"top_p": value if value < 1 else None} for value in TOP_P}
    if steps := getattr(pipeline.sampler, "steps", None):  # only masked-token priors have steps
        tried = sorted({max(1, steps // 2), steps, min(len(pipeline.prior.grid), 2 * steps)})
        settings["steps"] = {f"{value}": {"steps": value} for value in tried}
    return settings


def try_settings(
    sample_distance: Callable[[SamplingOptions], float], own: SamplingOptions, settings: Changes
) -> list[Trial]:
    """Try the pipeline's own options, then vary one setting after another, keeping the best so far."""
    sample_distance, trials = cache(sample_distance), list[Trial]()

    def attempt(setting: str, value: str, options: SamplingOptions) -> None:
        trials.append(Trial(setting, value, options, sample_distance(options)))
        print(f"{f'{setting} {value}':<18}Frechet distance {trials[-1].frechet_distance:.3f}", flush=True)

    attempt("before", "", own)
    for setting, values in settings.items():
        base = find_best(trials).options
        for value, changes in values.items():
            attempt(setting, value, replace(base, **changes))
    return trials


def find_best(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the lowest Frechet distance, the first one in case of ties."""
    return min(trials, key=lambda trial: trial.frechet_distance)


def draw_trials(trials: Sequence[Trial]) -> Pixels:
    """Plot the Frechet distance over the values of each setting; the dashed line is the setting before tuning."""
    settings = list(dict.fromkeys(trial.setting for trial in trials[1:]))
    groups = [[trial for trial in trials if trial.setting == setting] for setting in settings]

    def draw(figure: Figure) -> None:
        every = figure.subplots(1, len(groups), sharey=True, width_ratios=[*map(len, groups)], squeeze=False)[0]
        for axes, setting, group in zip(every, settings, groups, strict=True):
            axes.plot([trial.value for trial in group], [trial.frechet_distance for trial in group], "o", color=BLUE)
            axes.axhline(trials[0].frechet_distance, color=INK, linewidth=1, linestyle="--")
            axes.set(xlabel=setting, xlim=(-0.5, len(group) - 0.5))
        every[0].set_ylabel("Frechet distance")
        figure.suptitle(
            f"best: {find_best(trials).options.describe() or DEFAULTS}; dashed: before tuning "
            f"({trials[0].options.describe() or DEFAULTS})"
        )

    return render(120 + 60 * sum(map(len, groups)), 360, draw)


main = partial(run_command, TuneConfig, run, verb="tune", description=__doc__, defaults=defaults)
