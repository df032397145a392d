"""Evaluate a pipeline on held-out images: reconstructions, likelihoods, and the quality and novelty of samples."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from prior.checks import NotCausalError, is_built_in, require_causal
from prior.columns import LABEL
from prior.given import Given
from tokenizer.base import smallest_type
from tokenizer.files import PathError, PipelineLoadError, write_json
from tokenizer.spec import to_float, to_uint8

from .card import STAGES
from .config import OutputConfig, UserError, run_command
from .config.importing import format_imports
from .config.table import table
from .files import Output, lock_output
from .image_pipeline import ImagePipeline
from .images import TEST_DRAWS, ImageDataset, require_same_spec
from .images.grids import class_grid
from .images.origin import TOKENS_KEY, describe_source
from .images.pictures import LATENT, write_picture
from .images.splits import SPLITS, read_splits
from .metrics.agreement import agreement
from .metrics.fid import Inception, load_inception
from .metrics.figures import DIVISION, format_report
from .metrics.inferred import evaluate_columns
from .metrics.likelihood import evaluate_likelihood, evaluate_nats
from .metrics.pairs import condition_picture
from .metrics.quality import AT_A_TIME, LEAST, compare_samples, feature_space, fixed_permutation
from .metrics.reconstruction import SOME, evaluate_reconstruction, images_at_a_time, reconstruction_picture
from .metrics.samples import EvaluatedSamples
from .options import UsesImages, find_division
from .processes.group import ALONE, ProcessGroup
from .processes.launch import join_group
from .provenance import defaults, trained_data
from .saving import save_again
from .tokens import TokenSplit, load_tokens
from .training.schedule import describe_cut

T = TypeVar("T")
Figures = dict[str, Any]
Pictures = dict[str, np.ndarray]
RESULTS = ("samples.png", "reconstructions.png", "nearest.png", "evaluation.json", "evaluation.txt")
IN_MEMORY = 1 << 30  # bytes of decoded images per split that every process keeps
MOST_TRAINING = 100_000  # maximum number of training images to compare with
AGREEMENT = 0.95  # least share of images that agree with those of a token dataset in this share of their tokens
MAX_SEARCHED = 1 << 28  # maximum number of pixel values (1 GiB) of training images in nearest-neighbour search


class EvaluateConfig(UsesImages, OutputConfig):
    """Settings of `smalti evaluate`."""

    examples = (
        "pipeline=runs/gpt_digits/pipeline",
        "pipeline=runs/gpt_digits/pipeline num_images=200 update_card=false",
    )
    often = (
        "pipeline out overwrite num_images data.source feature_steps inception_weights num_orders update_card device"
    )

    out: str | None = Field(
        None, description="folder for pictures and evaluation.json; default: `evaluation` beside the pipeline folder"
    )
    num_images: int = Field(
        1000,
        ge=0,
        description="number of samples; sets of images are compared at this size, or at the size of the training or "
        "held-out split if that is smaller",
    )
    feature_steps: int = Field(
        300,
        ge=0,
        description="training steps of the small classifier that provides the features; with 0 steps, or without "
        "classes, its weights are random",
    )
    inception_weights: str | None = Field(
        None,
        description="file with torch-fidelity's Inception weights; adds standard FID, Inception Score and "
        "reconstruction FID; nothing is downloaded",
    )
    reference: str = Field(
        "held_out",
        description="reference of FID: `held_out` (as many images as samples), `train` (all images), or an .npz file "
        "with `mu` and `sigma` as published by ADM; use num_images=50000 with the last two",
    )
    tokens: str | None = Field(
        None,
        description="token dataset for the columns of the images, if the prior has any, and for the baseline of bits "
        "per token, the frequencies of ids per position; default: the prior's training tokens; without columns, if "
        f"these no longer exist, up to {MOST_TRAINING:,} training images are encoded",
    )
    num_orders: int = Field(1, ge=1, description="for an any-order prior: score a mixture of this many orders")
    seed: int = Field(0, ge=0, lt=1 << 63, description="sample k uses seed + k")
    update_card: bool = Field(True, description="write the figures to the pipeline's model card")


def run(config: EvaluateConfig) -> Figures:
    """Evaluate, print a table, write pictures and `evaluation.json`, update the model card, and return the figures.
    Several processes share the images; the main process prints and writes."""
    local = Path(config.pipeline).is_dir()
    out = Path(config.out or (Path(config.pipeline).parent / "evaluation" if local else "evaluation"))
    with join_group(config.device) as (group, device):
        pipeline, inception, tokens = group.main_first(lambda: load_inputs(config, out, device))
        card = config.pipeline if local and config.update_card else None
        with lock_output(out, group), lock_output(card, group, key="pipeline"):
            figures, pictures = Evaluation(config, pipeline, group).compute(inception, tokens)
            if group.is_main:
                publish_results(pipeline, config, out, figures, pictures)
    return figures


def load_inputs(
    config: EvaluateConfig, out: Path, device: torch.device
) -> tuple[ImagePipeline, Inception | None, Mapping[str, TokenSplit]]:
    """Load the pipeline, the Inception network and the splits of the token dataset. Raises `UserError` for mistakes
    that can be found before the evaluation starts."""
    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=device)
    require_same_spec(config.data, pipeline.tokenizer)
    if config.num_orders > 1 and not (pipeline.prior.any_order and pipeline.prior.exact):
        raise UserError(f"num_orders: this {pipeline.prior.name} prior does not have one density per order")
    channels = pipeline.spec.channels
    if config.inception_weights and channels not in (1, 3):
        raise UserError(f"inception_weights: Inception takes images with 1 or 3 channels (these have {channels})")
    find_division(config.data, pipeline.provenance, "held_out")  # raises before anything is read
    inception = load_inception(config.inception_weights, config.reference, device)
    make_output(config, out).check_files(RESULTS)
    return pipeline, inception, load_training_tokens(config.tokens, pipeline)


def make_output(config: EvaluateConfig, out: Path) -> Output:
    return Output(out, [config.pipeline, config.data.path], config.overwrite)


def load_training_tokens(tokens: str | None, pipeline: ImagePipeline) -> Mapping[str, TokenSplit]:
    """Return the splits of the token dataset `tokens`, by default of that which the prior was trained on, with the
    prior's columns; {} if it no longer exists. Raises `UserError` for tokens of another tokenizer, and for a prior with
    columns if they are missing."""
    source, columns = tokens or pipeline.provenance.get(TOKENS_KEY), pipeline.prior.config.conditions
    try:
        if not isinstance(source, str) or not (tokens or Path(source).is_dir()):
            raise UserError(f"tokens: give the token dataset with the columns {', '.join(columns)} of these images")
        data = load_tokens(source)
        if data.tokenizer.fingerprint() != pipeline.prior.config.tokenizer or not len(data.splits.get("train", ())):
            raise UserError(f"tokens: {source} has no training rows made by the pipeline's tokenizer")
        for name, column in columns.items():
            other = data.columns.get(name)
            if other is None or not column.takes_rows_of(other):
                raise UserError(f"tokens: {source} has no {column.kind} column {name!r} with the prior's meaning")
    except (PipelineLoadError, UserError):
        if tokens or columns:
            raise
        return {}
    label, other = (each.get(LABEL) for each in (pipeline.columns, data.columns))
    if label is not None and other is not None and label.takes_rows_of(other):
        columns = pipeline.columns
    return {name: rows.of_columns(columns) for name, rows in data.splits.items()}


def require_rows(tokens: Mapping[str, TokenSplit], split: str, images: ImageDataset) -> TokenSplit:
    """Return a split, which starts with the rows of `images`. Raises `UserError` if it is shorter."""
    rows = tokens.get(split)
    if rows is None or len(rows) < len(images):
        count = 0 if rows is None else len(rows)
        raise UserError(f"tokens: has columns of {count} {split} images, but there are {len(images)} such images")
    return rows


def are_same_images(rows: TokenSplit, test: TokenSplit) -> bool:
    """Whether the first `rows` are the images of `test`: nearly all agree in nearly all tokens, as another device may
    encode some of them otherwise."""
    chosen = slice(len(test))
    equal = (rows.rows(chosen) == test.rows(chosen)).flatten(1).float().mean(1)
    return float((equal >= AGREEMENT).float().mean()) >= AGREEMENT


class Evaluation:
    """An evaluation of a pipeline, shared by the processes of a group. At most `MOST_TRAINING` training images are
    decoded, each by one process, unless FID is computed against all of them."""

    def __init__(self, config: EvaluateConfig, pipeline: ImagePipeline, group: ProcessGroup) -> None:
        self.config, self.pipeline, self.group = config, pipeline, group
        self.images = config.load_images(pipeline, distributed=True, check=False)
        tokens = config.tokens or pipeline.provenance.get(TOKENS_KEY)
        self.token_facts = read_splits(Path(tokens) / SPLITS) if isinstance(tokens, str) else None
        check_classes(pipeline, self.images.train, self.images.held_out)
        most = max(LEAST, IN_MEMORY // math.prod(self.images.train.spec.shape))
        chosen = fixed_permutation(len(self.images.train))[: min(most, MOST_TRAINING)].sort().values
        self.train = self.images.train.preload(chosen, group)
        self.held_out = self.images.held_out
        if len(self.held_out) <= most:
            self.held_out = self.held_out.preload(torch.arange(len(self.held_out)), group)
        self.reconstruct = partial(reconstruct, pipeline)

    def compute(self, inception: Inception | None, tokens: Mapping[str, TokenSplit]) -> tuple[Figures, Pictures]:
        """Return all figures and pictures. tokens: the splits of a token dataset, if available."""
        config, pipeline, group = self.config, self.pipeline, self.group
        figures: Figures = {"num_images": len(self.held_out), "device": str(pipeline.device)}
        figures |= evaluate_reconstruction(pipeline.tokenizer, self.held_out, group=group, ssim_images=SOME)
        test = encode_all(pipeline, self.held_out, group)
        figures |= self.check_division(tokens, test)
        if pipeline.prior.config.conditions:
            rows = require_rows(tokens, "test", self.held_out)
            if not are_same_images(rows, test):
                raise UserError("tokens: the rows of its test split are not those of the held-out images")
            others = rows.given[: len(test)].without([LABEL])
            test = replace(test, given=test.given.with_rows(**others.rows))
        figures |= self.bits_per_token_and_dim(tokens.get("train"), test)
        if config.data.binarize is not None:
            figures |= self.nats_per_image(test)
        figures |= evaluate_columns(pipeline, test, group)
        pictures = {
            "samples": condition_picture(pipeline, test, self.held_out, seed=config.seed, group=group)
            if pipeline.prior.config.conditions
            else pipeline.sample_picture(seed=config.seed, group=group),
            "reconstructions": reconstruction_picture(pipeline.tokenizer, self.held_out),
        }
        samples = None
        if config.num_images:
            given = choose_given(pipeline, tokens, self.images.train, config.num_images)
            samples = draw_samples(pipeline, given, config.seed, group)
            figures |= {"num_samples": samples.count, "samples_per_second": samples.count / samples.seconds}
            if LABEL in given.rows and self.train.labels is not None and self.held_out.labels is not None:
                figures |= self.class_agreement(samples, given.rows[LABEL])
            found, nearest = self.measure_distances(samples)
            figures, pictures = figures | found, pictures | nearest
        if inception is not None:
            splits = replace(self.images, held_out=self.held_out)
            figures |= inception.figures(splits, self.reconstruct, samples, group)
        return figures, pictures

    def check_division(self, tokens: Mapping[str, TokenSplit], test: TokenSplit) -> Figures:
        """Return what is not known of the division of the images, if anything. tokens: the splits of the token dataset;
        test: those of the held-out images. Raises `UserError` if the tokens show that images which were divided by
        position have changed, and for columns that are those of other images."""
        config, images, source = self.config, self.images, self.config.data.source
        trained = trained_data(self.pipeline.provenance)
        note = images.note
        if images.facts is None and images.is_carved and tokens and trained and trained.limit == config.data.limit:
            draws = TEST_DRAWS if self.held_out.is_stochastic else 1
            there, here = len(tokens.get("test", ())) // draws, len(images.held_out)
            variants = len(tokens["train"]) % len(images.train)
            if there != here or variants or not are_same_images(tokens["test"], test):
                found = "other held-out images" if there == here else f"{here:,} held-out images instead of {there:,}"
                raise UserError(
                    f"data: {source} has changed since it was encoded ({found}); it "
                    "was divided by position, as in 0.3, so that images which were trained on would be held out now; "
                    "restore it, or encode it and train again"
                )
            note = None
        if note and self.pipeline.prior.config.conditions and self.token_facts != images.facts:
            raise UserError(f"tokens: {note}; encode it again for the columns of these images, and give tokens=FOLDER")
        return {} if note is None else {DIVISION: hide_source(note, source)}

    def bits_per_token_and_dim(self, tokens: TokenSplit | None, test: TokenSplit) -> Figures:
        """Return bits per token and per dim of held-out images, whose tokens are `test`. tokens: those of training
        images, if available. Raises `UserError` if the prior is not causal."""
        pipeline, group = self.pipeline, self.group
        if not is_built_in(pipeline.prior):
            try:
                require_causal(pipeline.prior, test.tokens[:1].long(), test.given[:1])
            except NotCausalError as error:
                raise UserError(f"pipeline: {error}; its likelihoods are meaningless") from error
        known = tokens or encode_all(pipeline, self.train, group)
        return evaluate_likelihood(
            pipeline.tokenizer,
            pipeline.prior,
            known,
            test,
            self.held_out,
            self.config.num_orders,
            pipeline.frequencies,
            group,
        )

    def nats_per_image(self, test: TokenSplit) -> Figures:
        """Return the mean -log p of a held-out image, whose black and white pixels are `test`. If they are drawn, it is
        the mean over `TEST_DRAWS` fixed draws, of which `test` is the first, with the standard deviation over draws."""
        draws = [test]
        for number in range(1, TEST_DRAWS if self.held_out.is_stochastic else 1):
            draws.append(replace(test, tokens=encode_all(self.pipeline, self.held_out, self.group, number).tokens))
        return evaluate_nats(self.pipeline.prior, draws, self.config.num_orders, self.group)

    def class_agreement(self, samples: EvaluatedSamples, wanted: Tensor) -> Figures:
        """Return how often a 1-nearest-neighbour classifier on training pixels assigns a sample to the requested class,
        and the same for held-out images and their reconstructions."""
        assert self.train.labels is not None and self.held_out.labels is not None
        some = fixed_permutation(len(self.held_out))[:SOME]
        seen = fixed_permutation(len(self.train))[: max(1, MAX_SEARCHED // math.prod(self.train.spec.shape))]
        known, labels = self.train.batch(seen), self.train.labels[seen]

        def share(parts: Sequence[T], images_of: Callable[[T], Tensor], wanted: Tensor) -> float:
            return agreement(parts, images_of, wanted, known, labels, self.group)

        parts, truth = some.split(AT_A_TIME), self.held_out.labels[some]
        return {
            "class_agreement": share(samples.parts, samples.images, wanted),
            "real_class_agreement": share(parts, self.held_out.batch, truth),
            "reconstruction_class_agreement": share(
                parts, lambda rows: self.reconstruct(self.held_out.batch(rows)), truth
            ),
            "class_agreement_images": len(some),
            "class_agreement_known": len(seen),
        }

    def measure_distances(self, samples: EvaluatedSamples) -> tuple[Figures, Pictures]:
        """Return the figures of samples in the features of a small classifier, and the picture `nearest`: rows of the
        samples most likely to be copies, each above a row of their nearest training images. Empty for too few
        images."""
        count = min(samples.count, len(self.train), len(self.held_out))
        if count < LEAST:
            return {}, {}
        source = describe_source(self.config.data.source)
        space = feature_space(self.train, self.held_out, self.config.feature_steps, source, self.group)
        features, columns = samples.rows(space, count), min(8, count)
        figures, order, nearest = compare_samples(
            space, features, self.train, self.held_out, self.reconstruct, self.group
        )
        copies, originals = samples.select(order[:16].tolist()), self.train.batch(nearest[:16])
        rows = zip(copies.split(columns), originals.split(columns), strict=True)
        parts = [(part, name) for pair in rows for part, name in zip(pair, ("sample", "nearest"), strict=True)]
        names = [name for part, name in parts for _ in part]
        pixels = self.pipeline.spec.picture(torch.cat([part for part, _ in parts]))
        picture = class_grid(pixels, names, columns)
        return {"feature_space": space.name, "feature_origin": space.origin, **figures}, {"nearest": picture}


def hide_source(note: str, source: str) -> str:
    """Return a line about a source without its path, which it has once."""
    start = "whether images of " if note.startswith("whether images of ") else ""
    return start + describe_source(source) + note.removeprefix(start + source)


def publish_results(
    pipeline: ImagePipeline, config: EvaluateConfig, out: Path, figures: Figures, pictures: Pictures
) -> None:
    text = "\n".join([format_report(figures, exact=pipeline.prior.exact), *describe_cuts(pipeline.provenance)])
    with make_output(config, out).files() as folder:
        for name, picture in pictures.items():
            write_picture(picture, folder / f"{name}.png")
        orders = {"num_orders": config.num_orders} if config.num_orders > 1 else {}
        write_json(folder / "evaluation.json", figures | orders)
        (folder / "evaluation.txt").write_text(text + "\n", encoding="utf-8")
    if config.update_card and Path(config.pipeline).is_dir():
        pipeline.provenance = {**pipeline.provenance, "evaluation": figures}
        try:
            save_again(pipeline, config.pipeline, pictures["samples"])
        except PathError as error:  # the figures have been written anyway
            print(f"warning: the model card was not updated: {error}", file=sys.stderr)
    print(text + "\n")
    if "feature_space" not in figures:
        print(f"samples are not compared, which needs at least {LEAST} samples, training images and held-out images\n")
    print(table([(name, f"{out / name}.png") for name in pictures] + [("figures", str(out / "evaluation.json"))]))
    # Suggest `tune` once, and only for a local folder, to which it can write.
    tunes = Path(config.pipeline).is_dir() and "tuning" not in pipeline.provenance
    verb = "tune" if tunes else "generate"
    print(f"\ndone; next: smalti {verb}{format_imports()} pipeline={quote(config.pipeline)}")


def describe_cuts(provenance: dict[str, Any]) -> list[str]:
    stages = [(name, provenance.get(name)) for name in STAGES]
    cuts = [(name, facts["steps"], facts["cut"]) for name, facts in stages if facts and facts.get("cut")]
    return [f"the {name} was {describe_cut(steps, cut)}" for name, steps, cut in cuts]


def check_classes(pipeline: ImagePipeline, *splits: ImageDataset) -> None:
    """Raise `UserError` if the classes of labelled images are not the pipeline's."""
    count, names = pipeline.prior.num_classes, pipeline.labels
    for split in splits:
        found = split.class_names
        if split.labels is not None and count and (len(found) != count or (names and names != found)):
            raise UserError(
                f"data.label_column: the pipeline's {count} classes differ from the {len(found)} of these images "
                f"({', '.join(found[:10])}); use null to ignore labels"
            )


def encode_all(pipeline: ImagePipeline, images: ImageDataset, group: ProcessGroup = ALONE, draw: int = 0) -> TokenSplit:
    """Encode a whole data set; return its tokens, and labels for a pipeline with classes. draw: number of the draw with
    `data.binarize=drawn`."""
    size, kind = images_at_a_time(images.spec), smallest_type(pipeline.prior.grid.vocab_size)

    def encode(start: int) -> np.ndarray:
        batch = images.batch(np.arange(start, min(start + size, len(images))), epoch=draw)
        return pipeline.encode(batch).cpu().to(kind).numpy()

    parts = group.map(encode, range(0, len(images), size))
    labels = {LABEL: images.labels} if LABEL in pipeline.columns and images.labels is not None else {}
    return TokenSplit(torch.from_numpy(np.concatenate(parts)), Given(pipeline.columns, labels, len(images)))


def reconstruct(pipeline: ImagePipeline, images: Tensor) -> Tensor:
    """Return reconstructions `(B, C, H, W)` on the CPU, rounded to 8 bits if the images have 8."""
    size = images_at_a_time(pipeline.spec)
    tokens = pipeline.encode(images, batch_size=size)
    decoded = pipeline.decode_batch(tokens, batch_size=size)
    return to_float(to_uint8(decoded)).cpu() if pipeline.spec.is_bytes else decoded.cpu()


def draw_samples(pipeline: ImagePipeline, given: Given, seed: int, group: ProcessGroup = ALONE) -> EvaluatedSamples:
    """Draw a sample for each row of `given`. Sample k uses seed + k, for any number of processes."""

    def draw(start: int, end: int) -> Tensor:
        options: dict[str, Any] = {"seed": seed + start, "output_type": LATENT, "progress": False}
        tokens = pipeline(end - start, condition=given[start:end], **options).tokens
        return pipeline.decode_batch(tokens, batch_size=64, progress=False)

    return EvaluatedSamples(draw, len(given), group)


def choose_given(pipeline: ImagePipeline, tokens: Mapping[str, TokenSplit], train: ImageDataset, count: int) -> Given:
    """Return what `count` samples are given: what is known of random training images; each class in turn if these have
    no labels. Raises `UserError` if `tokens` lack the columns of these images."""
    given, turns = Given(pipeline.columns, {}, count), torch.arange(count)
    chosen = fixed_permutation(len(train))[turns % len(train)]
    if pipeline.prior.config.conditions:
        given = require_rows(tokens, "train", train).given[chosen].of_columns(pipeline.columns)
    if LABEL in pipeline.columns:
        labels = turns % pipeline.prior.num_classes if train.labels is None else train.labels[chosen]
        given = given.with_rows(label=labels)
    return given


main = partial(run_command, EvaluateConfig, run, verb="evaluate", description=__doc__, defaults=defaults)


if __name__ == "__main__":
    main()
