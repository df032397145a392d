"""The pages of the API that are no family's: the pipeline, the contracts, data, and what is raised."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

MEMBERS = "    options:\n      inherited_members: true\n"

# Title, file, the sentences before, and the objects, each with further options.
PAGES: list[tuple[str, str, str, dict[str, str]]] = [
    (
        "ImagePipeline",
        "pipeline",
        "A tokenizer and a prior in one folder, and a method for each thing they can do together. "
        "[A first day](../guide.md#use-a-pipeline) shows them in use.",
        {
            "pipelines.image_pipeline.ImagePipeline": MEMBERS,
            "pipelines.stages.sampling.PipelineOutput": "",
        },
    ),
    (
        "Tokenizer",
        "tokenizer",
        "The contract of stage one. [The tokenizers](tokenizers/index.md) fulfil it; "
        "[Extending](../extending.md) adds one.",
        {"tokenizer.base": "", "tokenizer.pretrained.PretrainedModel": ""},
    ),
    (
        "Prior",
        "prior",
        "The contract of stage two. [The priors](priors/index.md) fulfil it; [Extending](../extending.md) adds one.",
        {"prior.base": "", "prior.sampling.settings.Sampler": "", "prior.orders": ""},
    ),
    (
        "Data",
        "data",
        "Image data sets, their settings, and what `smalti encode` makes of them. [Your own images](../data.md) "
        "is the page to read first.",
        {
            "pipelines.images.DataConfig": "",
            "pipelines.images.load_images": "",
            "pipelines.images.ImageDataset": "",
            "pipelines.tokens.TokenDataset": "",
            "pipelines.tokens.TokenSplit": "",
            "pipelines.tokens.load_tokens": "",
        },
    ),
]


def stage(texts: dict[str, str]) -> list[Any]:
    """Write the pages; returns their part of the navigation."""
    entries: list[Any] = []
    for title, name, before, objects in PAGES:
        parts = [f"# {title}", before, *(f"::: {path}\n{options}" for path, options in objects.items())]
        texts[f"reference/{name}.md"] = "\n\n".join(parts)
        entries.append({title: f"reference/{name}.md"})
    texts["reference/errors.md"] = errors()
    return [*entries, {"Errors": "reference/errors.md"}]


def raised() -> list[type[BaseException]]:
    """Every exception that the packages define and whose name does not begin with an underscore."""
    found = []
    for name in ("tokenizer", "prior", "pipelines"):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if module.name == "pipelines.__main__":
                continue
            for each in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(each) and issubclass(each, BaseException) and each.__module__ == module.name:
                    found.append(each)
    return found


def errors() -> str:
    """The page of what is raised: a table, then each."""
    classes = [cls for cls in raised() if not cls.__name__.startswith("_")]
    page = ["# Errors", "What is raised, and what it is a kind of. Each says in one line what was wrong, and where.", ""]
    rows = ["| error | is a | where |", "|---|---|---|"]
    for cls in classes:
        path = f"{cls.__module__}.{cls.__qualname__}"
        rows.append(f"| [`{cls.__name__}`][{path}] | `{cls.__bases__[0].__name__}` | `{cls.__module__}` |")
    each = [f"::: {cls.__module__}.{cls.__qualname__}\n" for cls in classes]
    return "\n\n".join([*page, "\n".join(rows), *each])
