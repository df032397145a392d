"""The pages of the API that are no family's: the pipeline, the contracts, data, and what is raised."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any, NamedTuple

import keys
from docstrings import tidy
from pydantic import BaseModel

PACKAGES = ("tokenizer", "prior", "pipelines")


class Reference(NamedTuple):
    """A page of the API: its title, its file, the sentences before, and what it documents."""

    title: str
    file: str
    before: str
    objects: list[str]


PAGES = [
    Reference(
        "ImagePipeline",
        "pipeline",
        "A tokenizer and a prior as one pipeline. [The guide](../guide.md#use-a-pipeline) shows the basics, [densities]"
        "(../density.md) completion, anomalies, search and compression.",
        [
            "pipelines.image_pipeline.ImagePipeline",
            "pipelines.image_pipeline.PipelineOutput",
            "pipelines.anomaly.healing.Healed",
            "pipelines.images.pictures.from_unit",
        ],
    ),
    Reference(
        "Tokenizer",
        "tokenizer",
        "The interface of stage one. See [all tokenizers](../models/tokenizers/index.md), and "
        "[Extending](../extending.md) for adding one.",
        ["tokenizer.base.Tokenizer", "tokenizer.base.TokenGrid", "tokenizer.base.Reconstruction"],
    ),
    Reference(
        "Prior",
        "prior",
        "The interface of stage two. See [all priors](../models/priors/index.md), [Extending](../extending.md) "
        "for adding one, and [Orders](../orders.md) for the names of orders.",
        [
            "prior.base.Prior",
            "prior.sampling.SamplingOptions",
            "prior.orders.Partition",
            "prior.orders.make_partition",
            "prior.orders.make_order",
            "prior.orders.block_numbers",
        ],
    ),
    Reference(
        "Data",
        "data",
        "Image data sets, their settings, and token datasets. Read [Your own images](../data.md) first.",
        [
            "pipelines.images.dataset.DataConfig",
            "pipelines.images.dataset.load_images",
            "pipelines.images.dataset.Splits",
            "pipelines.images.dataset.ImageDataset",
            "pipelines.tokens.dataset.load_tokens",
            "pipelines.tokens.dataset.TokenDataset",
            "pipelines.tokens.shards.TokenSplit",
        ],
    ),
]


def stage(texts: dict[str, str]) -> list[Any]:
    """Write the pages; returns their part of the navigation."""
    entries: list[Any] = []
    for page in PAGES:
        texts[f"api/{page.file}.md"] = "\n\n".join([f"# {page.title}", page.before, *map(block, page.objects)])
        entries.append({page.title: f"api/{page.file}.md"})
    texts["api/errors.md"] = errors()
    return [*entries, {"Errors": "api/errors.md"}]


def block(path: str) -> str:
    """One object: a configuration by its keys, anything else by its signature and docstring."""
    found = pkgutil.resolve_name(path)
    if is_config(found):
        rows = keys.of_verb(found)[0].rows
        return f"## {found.__name__}\n\n{tidy(found.__doc__ or '', set())}\n\n{keys.listing(rows, prefix='')}"
    return f"::: {path}\n{in_order(found) if inspect.isclass(found) else ''}"


def in_order(cls: type) -> str:
    """Options that show the public members of a class, inherited ones included."""
    options = ["inherited_members: true", "group_by_category: false", f"members: [{', '.join(members_of(cls))}]"]
    return "\n      ".join(["    options:", *options]) + "\n"


def members_of(cls: type) -> list[str]:
    """The public members of a class, its own ones before inherited ones, and loading first."""
    names = ["from_pretrained"]
    for each in cls.__mro__:
        if each.__module__.partition(".")[0] in PACKAGES:
            own = [*vars(each).get("__annotations__", ()), *vars(each)]
            names += [name for name in own if name == "__call__" or not name.startswith("_")]
    return list(dict.fromkeys(names))


def documented() -> dict[str, str]:
    """Where on the pages of the API the classes and their methods are: `Prior`, `Prior.sample`."""
    paths = [path for page in PAGES for path in page.objects]
    found = {pkgutil.resolve_name(path).__name__: path for path in paths} | {c.__name__: path_of(c) for c in raised()}
    for name, path in list(found.items()):
        each = pkgutil.resolve_name(path)
        if is_config(each):  # is shown by its keys
            found.pop(name)
        elif inspect.isclass(each):
            methods = [member for member in members_of(each) if getattr(getattr(each, member, None), "__doc__", None)]
            found |= {f"{name}.{member}": f"{path}.{member}" for member in methods}
    return found


def is_config(value: Any) -> bool:
    """Whether it is a configuration."""
    return inspect.isclass(value) and issubclass(value, BaseModel)


@cache
def raised() -> list[type[BaseException]]:
    """Every exception that the packages define, but for those that are a file's own business."""
    found = []
    for name in PACKAGES:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not module.name.endswith("__main__"):
                inside = vars(importlib.import_module(module.name)).values()
                found += [each for each in inside if is_exception(each) and each.__module__ == module.name]
    return [cls for cls in found if not cls.__name__.startswith("_")]


def is_exception(value: Any) -> bool:
    """Whether it is a class of exceptions."""
    return inspect.isclass(value) and issubclass(value, BaseException)


def path_of(cls: type) -> str:
    """Where a class is defined."""
    return f"{cls.__module__}.{cls.__qualname__}"


def errors() -> str:
    """The page of what is raised: a table, then each."""
    rows = ["| error | is a | where |", "|---|---|---|"]
    for cls in raised():
        base = cls.__bases__[0].__name__
        rows.append(f"| [`{cls.__name__}`][{path_of(cls)}] | `{base}` | `{cls.__module__}` |")
    each = [f"::: {path_of(cls)}" for cls in raised()]
    said = "All exceptions. Each has a one-line message with the problem, its place, and the allowed values."
    return "\n\n".join(["# Errors", said, "\n".join(rows), *each])
