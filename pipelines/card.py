"""The model card: what a pipeline is, its training data, its measured figures, and how to load it.

The Hub reads the header: library, licence, tags, pictures, and figures as a `model-index` (see the Hub's documentation
on "Model cards" and "Model card metadata").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prior import Prior
from prior.options import SamplingOptions
from tokenizer import Tokenizer

from .columns import ColumnFormat, formats_of
from .images.origin import describe_for_card, shareable
from .metrics.figures import DIVISION, FormattedFigure, format_rows
from .training.schedule import describe_cut

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from .image_pipeline import ImagePipeline

HUB_DATASET = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
HUB_LICENCE = r"[a-z0-9][a-z0-9.+-]{0,63}"
RUN_LINK = r"https?://[\w.:-]+/[\w./~%-]*"
STAGES = ("tokenizer", "prior")
ARROWS = {"higher": " (↑)", "lower": " (↓)", "": ""}
TUNING = (
    "settings",
    "before",
    "images",
    "validation_images",
    "num_samples",
    "feature_space",
    "frechet_distance",
    "frechet_distance_before",
)
TUNED = (
    "Sampling settings chosen by `smalti tune` on {validation_images} {images}: {settings}. Frechet distance "
    "[{feature_space}] {frechet_distance} (with the settings before, {before}: {frechet_distance_before}). "
    "{num_samples} samples of each."
)
"""A sentence with the facts in `TUNING`."""

TEMPLATE = """\
---
{{ card_data }}
---

# {{ tokenizer.name }} + {{ prior.name }}

Generates {{ images }}, {{ classes }}{{ given }}. The tokenizer \
(`{{ tokenizer.name }}`, {{ counts[0] }} parameters) turns an image into {{ shape }} ids of \
{{ prior.grid.vocab_size }}; the prior (`{{ prior.name }}`, {{ counts[1] }} parameters) models them.
{% if source %}
Trained on {{ source }}.
{% endif %}{% if has_grid %}
![samples](samples.png)
{% endif %}
```python
{{ imports }}from pipelines import ImagePipeline
pipe = ImagePipeline.from_pretrained("this folder or Hub id")
images = pipe(num_images=4{{ ", labels=0" if prior.num_classes else "" }}{{ example }}, seed=0).images
```
{% for line in lines %}
{{ line }}{% endfor %}
"""


def pipeline_card(pipeline: ImagePipeline, has_grid: bool) -> str:
    """Return markdown with a metadata header; all figures come from `pipeline.provenance`. has_grid: whether the folder
    contains a picture of samples."""
    from huggingface_hub import ModelCard

    tokenizer, prior, facts = pipeline.tokenizer, pipeline.prior, shareable(pipeline.provenance)
    rows = collect_figures(facts, exact=prior.exact)
    columns = list(formats_of(prior.config.conditions, pipeline.condition_tokenizers).values())
    examples = [f'"{column.name}": {example}' for column in columns if (example := column.example())]
    card = ModelCard.from_template(
        make_metadata(tokenizer, prior, facts, rows, has_grid),
        template_str=TEMPLATE,
        tokenizer=tokenizer,
        prior=prior,
        counts=[f"{sum(p.numel() for p in part.parameters()):,}" for part in (tokenizer, prior)],
        images=tokenizer.spec.describe(),
        shape=" x ".join(map(str, prior.grid.shape)),
        classes=f"{prior.num_classes} classes ({', '.join(pipeline.labels)})" if prior.num_classes else "no classes",
        given=f", given {', '.join(column.name for column in columns)}" if columns else "",
        imports="from PIL import Image\n" if any("Image.open" in one for one in examples) else "",
        example=f", condition={{{', '.join(examples)}}}" if examples else "",
        source=describe_for_card(facts),
        has_grid=has_grid,
        lines=[
            *format_conditions(columns),
            *format_sampler(pipeline.sampler),
            *format_tuning(facts.get("tuning", {})),
            *format_measurements(facts, rows),
            *format_run_links(facts),
        ],
    )
    return str(card)


def format_conditions(columns: Sequence[ColumnFormat[Any]]) -> list[str]:
    if not columns:
        return []
    cells = [(column.name, column.kind, column.describe(), column.encoder) for column in columns]
    lines = [f"| {' | '.join(map(to_cell, row))} |" for row in cells]
    about = "Values of `condition=`; each may be left out. Numbers are in the unit of the training data."
    head = ["| name | kind | values | encoder |", "|---|---|---|---|"]
    return ["## Conditions", "", about, "", *head, *lines, ""]


def collect_figures(facts: dict[str, Any], *, exact: bool) -> list[FormattedFigure]:
    """Return the figures of `smalti evaluate`, or those of training if it did not run."""
    if evaluation := facts.get("evaluation"):
        return format_rows(evaluation, exact=exact)
    found = []
    for stage in (facts.get(name, {}) for name in STAGES):
        images = stage.get("images")
        counts = images if isinstance(images, dict) else {}
        of = {"num_images": counts.get("held_out"), "num_validation": counts.get("validation")}
        found += format_rows({**stage.get("evaluation", {}), **of}, exact=exact)
    return found


def format_measurements(facts: dict[str, Any], rows: Sequence[FormattedFigure]) -> list[str]:
    lines = [
        f"| {to_cell(row.title)}{ARROWS[row.figure.better]} | {to_cell(row.value)} | {to_cell(row.beside)} |"
        for row in rows
    ]
    for stage in STAGES:
        trained = facts.get(stage, {})
        if {"steps", "minutes"} <= set(trained):
            best = trained.get("best_step")
            weights = f"weights of step {best}, best on validation images" if type(best) is int else ""
            length = f"{trained['steps']} steps, {trained['minutes']:.1f} minutes"
            if cut := trained.get("cut"):
                length = describe_cut(trained["steps"], cut)
            lines.append(f"| training of the {stage} | {length} | {weights} |")
    if not lines:
        return []
    by = "`smalti evaluate`" if facts.get("evaluation") else "training"
    head = ["| figure | value | compare with |", "|---|---|---|"]
    changed = facts["evaluation"].get(DIVISION) if facts.get("evaluation") else None
    more = [f"Images: {to_cell(changed)}.", ""] if isinstance(changed, str) else []
    return ["## Measured", "", f"By {by}. ↑: higher is better, ↓: lower is better.", "", *head, *lines, "", *more]


def format_sampler(sampler: SamplingOptions) -> list[str]:
    if not (settings := sampler.describe()):
        return []
    off = " Guidance exaggerates what is asked for; `guidance_scale=1` turns it off." if sampler.guides else ""
    return [f"Samples by default with `{settings}`.{off} Likelihoods do not depend on these settings.", ""]


def format_tuning(tuning: dict[str, Any]) -> list[str]:
    if "settings" not in tuning:
        return []
    facts = {name: format_fact(tuning.get(name)) for name in TUNING}
    return [TUNED.format_map(facts), ""]


def format_fact(value: Any) -> str:
    """Format a number to four digits, or text as a table cell."""
    return to_cell(value) if isinstance(value, str) else f"{value:.4g}" if isinstance(value, (int, float)) else "?"


def to_cell(text: str) -> str:
    """Escape the text for a cell of a markdown table."""
    return " ".join(text.replace("|", "/").split())


def format_run_links(facts: dict[str, Any]) -> list[str]:
    links = []
    for stage in STAGES:
        trained = facts.get(stage)
        url = trained.get("run_url") if isinstance(trained, dict) else None
        if isinstance(url, str) and re.fullmatch(RUN_LINK, url):
            links.append(f"[{stage}]({url})")
    return [f"Training runs: {', '.join(links)}.", ""] if links else []


# The header


def make_metadata(
    tokenizer: Tokenizer, prior: Prior, facts: dict[str, Any], rows: Sequence[FormattedFigure], has_grid: bool
) -> ModelCardData:
    from huggingface_hub import ModelCardData

    source, licence = str(facts.get("data", {}).get("source", "")), facts.get("license")
    kind = describe_kind(prior)
    more: dict[str, Any] = {}
    if has_grid:
        text = "samples, one class per column" if prior.num_classes else "samples"
        text = "samples given held-out conditions" if prior.config.conditions else text
        more["widget"] = [{"text": text, "output": {"url": "samples.png"}}]
    if results := make_results(prior, facts, rows):
        more |= {"model_name": f"{tokenizer.name} + {prior.name}", "eval_results": results}
    return ModelCardData(
        library_name="smalti",
        license=licence if isinstance(licence, str) and re.fullmatch(HUB_LICENCE, licence) else None,
        pipeline_tag=f"{kind}-image-generation" if kind == "unconditional" else None,  # the Hub has no other task
        tags=["image-generation", kind, tokenizer.name, prior.name],
        datasets=[source] if is_on_hub(source) else None,
        **more,
    )


def describe_kind(prior: Prior) -> str:
    if prior.config.conditions:
        return "conditional"
    return "class-conditional" if prior.num_classes else "unconditional"


def is_on_hub(source: str) -> bool:
    """Return whether `source`, from `shareable` facts (which contain no paths), is the id of a data set on the Hub."""
    return bool(re.fullmatch(HUB_DATASET, source))


def make_results(prior: Prior, facts: dict[str, Any], rows: Sequence[FormattedFigure]) -> list[EvalResult]:
    """Return the figures that belong to a task of the Hub, for a `model-index`."""
    from huggingface_hub import EvalResult

    source = str(facts.get("data", {}).get("source", ""))
    name = (describe_for_card(facts) or "unknown images").strip("`")
    kind = source if is_on_hub(source) else "digits" if source == "digits" else "imagefolder"
    generation = f"{describe_kind(prior)}-image-generation"
    tasks = {"reconstruction": "image-to-image", "likelihood": generation, "samples": generation}
    results = []
    for row in rows:
        figure = row.figure
        if figure.better and figure.of in tasks and type(row.raw) in (int, float):
            bound = "" if prior.exact or not figure.is_bits else " (upper bound)"
            results.append(
                EvalResult(
                    tasks[figure.of],
                    kind,
                    name,
                    figure.key,
                    float(f"{row.raw:.6g}"),
                    dataset_split="test",
                    metric_name=f"{row.title}{bound}, held out",
                )
            )
    return results
