"""Choose the settings of sampling on validation images, and keep the best in the pipeline."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from prior.sampling import SamplingOptions
from tokenizer.files import PathError, require_replaceable, write_json

from ..card import OF_SAMPLES
from ..config import Of, OutputConfig, UserError, run_command
from ..evaluate import KNOWN, check_classes, draw_samples, wanted_labels
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images import DataConfig, ImageDataset, Splits, check_shape, load_images
from ..images.origin import describe_source, place_of
from ..images.pictures import write_picture
from ..images.unseen import count_seen, require_unseen
from ..metrics.agreement import agreement
from ..metrics.frechet import Moments, distance, moments
from ..metrics.quality import AT_A_TIME, FeatureSpace, feature_space, neighbourhoods, shuffled
from ..metrics.tuning import FINAL_TIMES, HEAD, RULE, UNITS, Scores, Search, Trial, line_of, told
from ..metrics.tuning_chart import picture
from ..processes.group import ProcessGroup
from ..processes.launch import join_group
from ..provenance import defaults, trained_data
from ..saving import PIPELINE, PipelineFolder, save_again

RESULTS = ("tuning.json", "tuning.png")
LEAST_VALIDATION, FEW_VALIDATION = 30, 300
LEAST_IMAGES, MOST_IMAGES = 50, 2000
WARM_UP = 64  # images that tell how long others take
SPARE = 0.85  # the share of the time that is planned for


class TuneConfig(OutputConfig):
    """What is searched, on what, for how long."""

    examples = ("pipeline=runs/gpt_digits/pipeline minutes=10",)
    often = "pipeline out overwrite minutes num_images store data.source device"

    pipeline: PipelineFolder = Field(description="pipeline folder; the settings that are chosen are written into it")
    out: str | None = Field(
        None, description="folder for tuning.json and tuning.png; default: `tuning` beside the pipeline folder"
    )
    data: Annotated[DataConfig, Of("pipeline")] = Field(
        DataConfig(),
        description="the images, of which those for validation choose; defaults to those the pipeline was trained on",
    )
    minutes: float = Field(
        10.0, gt=0, description="the time of the search, once images are read and a classifier is trained"
    )
    num_images: int | None = Field(
        None,
        ge=LEAST_IMAGES,
        description="samples of each setting, and of each finalist twice as many; null: as many as the time allows, at "
        "most 2,000; a number makes the search the same on any machine that has the time for it",
    )
    feature_steps: int = Field(
        300, ge=0, description="training steps of the classifier in whose features samples are judged, as of `evaluate`"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="sample k uses seed + k; finalists use other seeds")
    store: bool = Field(True, description="write the best settings into the pipeline; false: only say which they are")
    device: str = Field("auto", description="cpu, cuda, mps or auto")


def run(config: TuneConfig) -> dict[str, Any]:
    """Search, print a table as it goes, write the results, and store the best settings; returns what `tuning.json`
    holds. Of several processes each draws its part of the images; the first prints and writes."""
    out = Path(config.out or Path(config.pipeline).parent / "tuning")
    with join_group(config.device) as (group, device):
        pipeline = group.main_first(lambda: prepare(config, out, device))
        stored = config.pipeline if config.store else None
        with lock_output(out, group), lock_output(stored, group, key="pipeline"):
            images, origin = choosing_images(config, pipeline, group)
            if group.is_main:
                print(f"making the feature space of {len(images.train):,} training images", flush=True)
            ruler, own = Ruler.of(pipeline, images, config, group), pipeline.sampler
            ends = time.monotonic() + 60 * config.minutes

            def left() -> float:
                return group.on_main(lambda: ends - time.monotonic())

            num_images = config.num_images or affordable(ruler, own, left, config.minutes)
            if group.is_main:
                print(f"{len(ruler.validation):,} {origin}; {num_images} samples a setting, in {ruler.space.name}")
                if ruler.real_agreement is not None:
                    print(f"class agreement of real validation images: {ruler.real_agreement:.3f}")
                print(HEAD, flush=True)
            search = Search(
                ruler.judge,
                own,
                guided=bool(pipeline.prior.num_classes),
                vocab_size=pipeline.prior.grid.vocab_size,
                num_images=num_images,
                seed=config.seed,
                real_agreement=ruler.real_agreement,
                left=left,
            )
            best = search.run()
            facts = facts_of(search, best, ruler, origin)
            if group.is_main:
                publish(config, out, pipeline, search, best, facts)
    return facts


def prepare(config: TuneConfig, out: Path, device: torch.device) -> ImagePipeline:
    """The pipeline. Raises `UserError` for mistakes that can be found before anything is drawn."""
    folder = Path(config.pipeline)
    if config.store and not folder.is_dir():
        raise UserError(
            f"pipeline: {config.pipeline!r} is not a folder, and the settings are written into it; store=false only "
            "says which they are"
        )
    if config.store:
        require_replaceable(folder, PIPELINE)
    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=device)
    check_shape(config.data, pipeline.tokenizer.image_shape)
    require_unseen(config.data, trained_data(pipeline.provenance), "validation")
    output_of(config, out).check_files(RESULTS)
    return pipeline


def output_of(config: TuneConfig, out: Path) -> Output:
    """Where the results go."""
    return Output(out, [config.pipeline, config.data.path], config.overwrite)


def choosing_images(config: TuneConfig, pipeline: ImagePipeline, group: ProcessGroup) -> tuple[Splits, str]:
    """The images to train a classifier on, and those to choose by, and these in words. Never the held-out ones: the
    figures that `evaluate` reports are of images that have chosen nothing. Raises `UserError` for too few."""
    trained = trained_data(pipeline.provenance)
    images, origin = load_images(config.data), f"validation images of {describe_source(config.data.source)}"
    if images.validation is None:  # the share that would have been kept from training
        aside = config.data.model_copy(update={"validation_fraction": None})
        images = load_images(aside)
        if images.validation is not None and (trained is None or count_seen(aside, trained, "validation")[0]):
            aside_of = f"{describe_source(config.data.source)} held aside from its training split"
            origin = f"images of {aside_of}, which the pipeline has seen"
            if group.is_main:
                print(f"warning: no validation images were kept from training: {origin}", file=sys.stderr)
    count = 0 if images.validation is None else len(images.validation)
    if images.validation is None or count < LEAST_VALIDATION:
        mine = trained is not None and place_of(config.data.source) == place_of(trained.source)
        remedy = (
            "train again with data.validation_fraction=0.2, or choose by images of your own "
            "(data.source=FOLDER data.validation_fraction=0.5)"
        )
        raise UserError(
            f"data: choosing needs at least {LEAST_VALIDATION} validation images, and there are {count}; "
            + (remedy if mine else "data.validation_fraction=0.5 takes a larger share of them")
        )
    if group.is_main and count < FEW_VALIDATION:
        print(f"warning: {count} validation images choose only roughly: near figures are noise", file=sys.stderr)
    check_classes(pipeline, images.train, images.validation)
    return images, origin


@dataclass(frozen=True)
class Ruler:
    """What samples are held against: the rows of validation images in a feature space, and labelled training pixels."""

    pipeline: ImagePipeline
    group: ProcessGroup
    space: FeatureSpace
    validation: Tensor
    real: Moments
    labels: Tensor | None
    known: tuple[Tensor, Tensor] | None
    real_agreement: float | None

    @classmethod
    def of(cls, pipeline: ImagePipeline, images: Splits, config: TuneConfig, group: ProcessGroup) -> Ruler:
        """Of a classifier that has seen none but training images."""
        train, validation = images.train, images.validation
        assert validation is not None
        space = feature_space(train, validation, config.feature_steps, describe_source(config.data.source), group)
        rows = space.of(validation, shuffled(len(validation)), group=group)
        labels = wanted_labels(pipeline, train, MOST_IMAGES * FINAL_TIMES)
        known = known_pixels(train) if labels is not None and train.labels is not None else None
        agreed = None
        if known is not None and validation.labels is not None:
            parts = shuffled(len(validation))[:MOST_IMAGES].split(AT_A_TIME)
            agreed = agreement(parts, validation.batch, validation.labels[torch.cat(parts)], *known, group)
        return cls(pipeline, group, space, rows, moments(rows), labels, known, agreed)

    def scores(self, sampler: SamplingOptions, count: int, seed: int) -> Scores:
        """Of `count` samples drawn with these settings, the k-th from seed + k."""
        self.pipeline.sampler = sampler
        labels = None if self.labels is None else self.labels[torch.arange(count) % len(self.labels)]
        samples = draw_samples(self.pipeline, labels, count, seed, self.group)
        rows = samples.rows(self.space, count)
        same = min(count, len(self.validation))
        recall = neighbourhoods(self.validation[:same], rows[:same], self.group)["recall"]
        agreed = None
        if self.known is not None and labels is not None:
            agreed = agreement(samples.parts, samples.images, labels, *self.known, self.group)
        return Scores(distance(moments(rows), self.real), recall, agreed)

    def judge(self, stage: str, sampler: SamplingOptions, count: int, seed: int) -> Trial:
        """A trial, which is told in a line."""
        began = time.monotonic()
        scores = self.scores(sampler, count, seed)
        seconds = self.group.on_main(lambda: time.monotonic() - began)
        trial = Trial(stage, sampler, count, seed, scores, seconds)
        if self.group.is_main:
            print(line_of(trial), flush=True)
        return trial


def known_pixels(train: ImageDataset) -> tuple[Tensor, Tensor]:
    """Images and labels that a sample is compared to, as many as memory may hold."""
    assert train.labels is not None
    seen = shuffled(len(train))[: max(1, KNOWN // math.prod(train.image_shape))]
    return train.batch(seen), train.labels[seen]


def affordable(ruler: Ruler, own: SamplingOptions, left: Callable[[], float], minutes: float) -> int:
    """How many samples of each setting the time allows. Raises `UserError` if these are too few."""
    both = 2 if ruler.labels is not None else 1  # guided images are two rows each
    began = time.monotonic()
    ruler.scores(own, WARM_UP, 0)
    each = ruler.group.on_main(lambda: (time.monotonic() - began) / WARM_UP) * both / own.rows_per_image
    count = int(SPARE * left() / UNITS / each)
    if count < LEAST_IMAGES:
        enough = minutes + (LEAST_IMAGES * UNITS * each / SPARE - left()) / 60
        raise UserError(
            f"minutes: {minutes:g} allow for {max(0, count)} samples of each setting, and {LEAST_IMAGES} are the least "
            f"that say something; about {math.ceil(enough * 10) / 10:g} minutes would do"
        )
    return min(count, MOST_IMAGES)


# What is told and written


def facts_of(search: Search, best: Trial, ruler: Ruler, origin: str) -> dict[str, Any]:
    """What `tuning.json` holds."""
    before = search.final_of(search.own)
    return {
        "chosen": best.sampler.to_dict(),
        "told": told(best.sampler),
        "before": told(search.own),
        "rule": RULE,
        "ended": search.ended,
        "feature_space": ruler.space.name,
        "feature_origin": ruler.space.origin,
        "images": origin,
        "validation_images": len(ruler.validation),
        "real_class_agreement": ruler.real_agreement,
        "num_samples": best.num_images,
        **vars(best.scores),
        "frechet_distance_before": before.distance,
        "trials": [row_of(trial) for trial in [*search.trials, *search.finals]],
    }


def row_of(trial: Trial) -> dict[str, Any]:
    """A trial, flat."""
    own = {field.name: getattr(trial, field.name) for field in fields(trial) if field.name not in ("sampler", "scores")}
    return {**own, "settings": trial.sampler.to_dict(), **vars(trial.scores)}


def publish(
    config: TuneConfig, out: Path, pipeline: ImagePipeline, search: Search, best: Trial, facts: dict[str, Any]
) -> None:
    """Write the results, store the settings, and say what was chosen."""
    with output_of(config, out).files() as folder:
        write_json(folder / "tuning.json", facts)
        write_picture(picture(search.trials, best, facts), folder / "tuning.png")
    print(f"\nchosen: {told(best.sampler)}: Frechet distance {best.distance:.3f}, before ({facts['before']}) ", end="")
    print(f"{facts['frechet_distance_before']:.3f}; {search.ended or 'the search went to its end'}")
    print(f"rule: {RULE}\ncurve: {out / 'tuning.png'}, figures: {out / 'tuning.json'}")
    if not config.store:
        return
    try:
        store(pipeline, Path(config.pipeline), search.own, best, facts)
        print(f"{config.pipeline}: samples with these settings by default")
    except PathError as error:  # the figures are there all the same
        print(f"warning: the pipeline is as it was: {error}", file=sys.stderr)


def store(pipeline: ImagePipeline, folder: Path, own: SamplingOptions, best: Trial, facts: dict[str, Any]) -> None:
    """Keep the settings, with their figures, in the pipeline folder; figures and pictures of samples at other settings
    go."""
    pipeline.sampler = best.sampler
    kept = {name: value for name, value in facts.items() if name != "trials"}
    pipeline.provenance = {**pipeline.provenance, "tuning": kept}
    if best.sampler != own:
        evaluation: dict[str, Any] = pipeline.provenance.get("evaluation", {})
        left = {name: value for name, value in evaluation.items() if name not in OF_SAMPLES}
        if evaluation:
            pipeline.provenance["evaluation"] = left
    save_again(pipeline, folder, None if pipeline.sample_grid is None else pipeline.sample_picture())


main = partial(run_command, TuneConfig, run, verb="tune", description=__doc__, defaults=defaults)
