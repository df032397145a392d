"""Provenance of a model: the data it was trained on, saved beside it and used as defaults by the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ValidationError

from tokenizer import Tokenizer
from tokenizer.files import FormatError, atomic_folder, quote, read_json
from tokenizer.model import CONFIG, PROVENANCE

from .config import RunSubfolder
from .images import DataConfig
from .images.hub import fetch_file
from .images.origin import REMARK, resolve_source
from .images.settings import OPTIONAL
from .images.splits import DIVISION, SPLITS, SPLITS_KEY, Inherited, SplitFacts, inherit_splits, join_splits
from .saving import INDEX, resolve_shipped, write_provenance
from .tokens.meta import META, read_meta

IN_RUN = RunSubfolder("tokenizer", CONFIG)
TokenizerFolder = Annotated[str, IN_RUN]
"""A tokenizer's folder, a run or pipeline that contains it, or a Hub id."""


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Return the training data of the pipeline on the command line."""
    return {"data": read_data_settings(find_file(str(resolve_shipped(str(given.get("pipeline") or ""))), PROVENANCE))}


def tokenizer_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Return the training data of the tokenizer or pipeline on the command line."""
    return {"data": read_training_data(str(given.get("tokenizer") or ""))}


def read_training_data(tokenizer: str) -> dict[str, Any]:
    """Return the settings of the images that a tokenizer was trained on, if recorded. Raises `FormatError`."""
    return dict(read_training_facts(tokenizer).get("data", {}))


def read_training_facts(tokenizer: str) -> dict[str, Any]:
    """Return the settings of the images that a tokenizer was trained on, and how they were divided, as far as they are
    recorded. Raises `FormatError`."""
    source = tokenizer_folder(tokenizer)
    pipeline = Path(source).parent
    if (pipeline / META).is_file():  # a token dataset
        return read_meta(pipeline).source
    in_pipeline = (pipeline / INDEX).is_file()  # a pipeline records them once for both models
    folder = str(pipeline) if in_pipeline else source
    path = find_file(folder, PROVENANCE)
    recorded = {} if path is None else read_json(path)
    facts = {"data": read_data_settings(path)}
    facts |= {SPLITS_KEY: recorded[SPLITS_KEY]} if SPLITS_KEY in recorded else {}
    return join_splits(facts, find_file(folder, SPLITS) or Path(folder) / SPLITS)


def find_file(source: str, name: str) -> Path | None:
    """Return the file `name` of a model, in its folder or, for a Hub id, in the cache; None if it cannot be found
    (loading the model then raises the error)."""
    if not source:
        return None
    path = Path(source) / name if Path(source).is_dir() else fetch_file(source, name)
    return path if path is not None and path.is_file() else None


def read_data_settings(path: Path | None) -> dict[str, Any]:
    """Return the settings of the images in the `provenance.json` at `path`, empty if there is no file. Raises
    `FormatError`."""
    found = {} if path is None else read_json(path).get("data", {})
    if not isinstance(found, dict):
        raise FormatError(f"{path}: data: expected an object of settings, found {quote(found)}")
    return found and {**OPTIONAL, **found}  # written only if set


def trained_data(provenance: dict[str, Any]) -> DataConfig | None:
    """Return the settings of the images that a model was trained on; None if they are not recorded or not valid in this
    version."""
    found = provenance.get("data")
    try:
        return DataConfig.model_validate(found) if isinstance(found, dict) and found else None
    except ValidationError:
        return None


def inherit(config: DataConfig, facts: dict[str, Any], *, regroup: bool = False) -> Inherited:
    """Return how to divide `config`, given the provenance of a model; see `inherit_splits`. Raises `UserError`."""
    trained, divided = trained_data(facts), facts.get(SPLITS_KEY)
    same = trained is not None and resolve_source(config.source) == resolve_source(trained.source)
    splits = None if divided is None else SplitFacts.model_validate(divided)
    return inherit_splits(config, trained, splits, same, regroup=regroup)


def are_divided_differently(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the facts about two models say that they divided the images of one source differently. A run of 0.3 holds
    out other images than one by name, unless the source has a split for that."""
    data, others = trained_data(one), trained_data(other)
    if data is None or others is None or data.source.startswith(REMARK):
        return False
    if resolve_source(data.source) != resolve_source(others.source):
        return False
    rules = [SplitFacts.model_validate(facts[SPLITS_KEY]) if SPLITS_KEY in facts else None for facts in (one, other)]
    known = [rule for rule in rules if rule is not None]
    if len(known) == 1:
        return known[0].held_out_split is None
    if known:
        return known[0].rule != known[1].rule
    return any(getattr(data, key) != getattr(others, key) for key in DIVISION)


def tokenizer_folder(source: str) -> str:
    """Return the tokenizer's folder if `source` is a run, a pipeline or a shipped pipeline's name, else `source`."""
    source = str(resolve_shipped(source))
    within = [path for path in (Path(source), Path(source) / "pipeline") if (path / INDEX).is_file()]
    return str(within[0] / "tokenizer") if within else str(IN_RUN.resolve(source))


def find_protected_folder(tokenizer: str) -> str:
    """Return the folder that an output must not be in: the tokenizer's own, or the pipeline that contains it, whose
    manifest must list every file."""
    around = Path(tokenizer_folder(tokenizer)).parents[:2]  # two folders up from the tokenizer of a grid
    return next((str(folder) for folder in around if (folder / INDEX).is_file()), tokenizer)


def save_tokenizer(model: Any, folder: Path, provenance: dict[str, Any]) -> None:
    """Save a tokenizer with a `provenance.json`, from which later stages read the data source."""
    with atomic_folder(folder, kind=Tokenizer.folder_kind()) as target:
        model.save_pretrained(target)
        write_provenance(target, provenance)
