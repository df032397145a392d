"""Where a model comes from: the data it was trained on, saved beside it, and used as defaults by the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ValidationError

from tokenizer import Tokenizer
from tokenizer.files import FormatError, atomic_folder, quote, read_json, write_json
from tokenizer.model import CONFIG, PROVENANCE

from .config import Within
from .images import DataConfig
from .images.hub import fetched
from .saving import INDEX, located

IN_RUN = Within("tokenizer", CONFIG)
TokenizerFolder = Annotated[str, IN_RUN]
"""A tokenizer's folder, the run or the pipeline that it is in, or a Hub id."""


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The data that the pipeline named on the command line was trained on."""
    return {"data": data_beside(file_of(str(located(str(given.get("pipeline") or ""))), PROVENANCE))}


def tokenizer_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The data that the tokenizer named on the command line, or the pipeline named there, was trained on."""
    return {"data": data_of(str(given.get("tokenizer") or ""))}


def data_of(tokenizer: str) -> dict[str, Any]:
    """The settings of the images that a tokenizer was trained on, where it says so. Raises `FormatError`."""
    source = tokenizer_folder(tokenizer)
    pipeline = Path(source).parent
    in_pipeline = (pipeline / INDEX).is_file()  # which says it once, for both models
    return data_beside(file_of(str(pipeline) if in_pipeline else source, PROVENANCE))


def file_of(source: str, name: str) -> Path | None:
    """The file `name` of a model, in its folder or, of a Hub id, in the cache; None where it cannot be found: loading
    the model will say why."""
    if not source:
        return None
    path = Path(source) / name if Path(source).is_dir() else fetched(source, name)
    return path if path is not None and path.is_file() else None


def data_beside(path: Path | None) -> dict[str, Any]:
    """The settings of the images in the file `path`, a `provenance.json`; none where there is no such file. Raises
    `FormatError`."""
    found = {} if path is None else read_json(path).get("data", {})
    if not isinstance(found, dict):
        raise FormatError(f"{path}: data: expected an object of settings, found {quote(found)}")
    return found


def trained_data(provenance: dict[str, Any]) -> DataConfig | None:
    """The settings of the images that a model says it was trained on; None where it says nothing, or what this version
    does not read."""
    found = provenance.get("data")
    try:
        return DataConfig.model_validate(found) if isinstance(found, dict) and found else None
    except ValidationError:
        return None


def tokenizer_folder(source: str) -> str:
    """`source`, or the tokenizer in it when it is a run of one, or a pipeline: a folder, its run, or one that comes
    with the package."""
    source = str(located(source))
    within = [path for path in (Path(source), Path(source) / "pipeline") if (path / INDEX).is_file()]
    return str(within[0] / "tokenizer") if within else str(IN_RUN.resolve(source))


def read_with(tokenizer: str) -> str:
    """What nothing may be written into while a tokenizer is read: its folder, or the pipeline that it is in, which
    holds nothing but what its manifest lists."""
    pipeline = Path(tokenizer_folder(tokenizer)).parent
    return str(pipeline) if (pipeline / INDEX).is_file() else tokenizer


def save_tokenizer(model: Any, folder: Path, provenance: dict[str, Any]) -> None:
    """`save_pretrained`, and `provenance.json` beside the weights, from which later stages learn the data source."""
    with atomic_folder(folder, kind=Tokenizer.folder_kind()) as target:
        model.save_pretrained(target)
        write_json(target / PROVENANCE, provenance)
