"""Verify a folder against the checksums in its manifest, or check your own models against their contract."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tokenizer.files import MANIFEST, verify_manifest

from ..config import Config, RunSubfolder, UserError, importing, run_command
from ..tokens import load_tokens
from ..tokens.meta import META
from ..tokens.shards import chunks


class VerifyConfig(Config):
    examples = ("folder=runs/gpt_digits/pipeline", "--import my_prior.py", "--import my_prior.py grid=4,4")

    folder: Annotated[str | None, RunSubfolder("pipeline", MANIFEST)] = Field(
        None, description="folder with a manifest.json: tokens, a pipeline, a run; null: check models of --import"
    )
    grid: list[Annotated[int, Field(ge=1, le=64)]] = Field(
        [2, 3], min_length=1, max_length=3, description="token grid for checking an imported prior"
    )
    vocab_size: int = Field(3, ge=2, description="vocabulary size for checking an imported prior")
    image_size: list[Annotated[int, Field(ge=1, le=256)]] = Field(
        [16, 16], min_length=2, max_length=2, description="image size for checking an imported tokenizer"
    )


def run(config: VerifyConfig) -> Path | None:
    """Verify every file in the manifest, and every id and column of a token dataset; return the folder. Without a
    folder, check the imported models.

    Raises a `PipelineLoadError` that names the first missing or changed file, or `UserError` for a model that fails a
    check.
    """
    if config.folder is not None:
        folder = Path(config.folder)
        files = verify_manifest(folder)["files"]
        if (folder / META).is_file():
            data = load_tokens(folder, verify=False, mapped=True)
            for split in data.splits.values():
                for rows in chunks(len(split)):
                    split.tokens[rows], split.given[rows]  # reading checks the ids and the columns
        size = sum(entry["size"] for entry in files.values())
        print(f"{folder}: {len(files)} files ({size:,} bytes) match {MANIFEST}")
        return folder
    if not importing.IMPORTED:
        raise UserError("folder: missing; give folder=FOLDER, or --import FILE to check your own models")
    found = list(check_imported_models(config))
    for name, promise, problem in found:
        print(f"ok      {name}: {promise}" if problem is None else f"BROKEN  {name}: {promise}: {problem}")
    if not found:
        raise UserError("--import: no prior, quantizer or tokenizer was registered")
    if broken := [f"{name}: {promise}" for name, promise, problem in found if problem is not None]:
        raise UserError(f"--import: {len(broken)} of {len(found)} checks failed, the first is {broken[0]}")
    print(f"all {len(found)} checks passed")
    return None


def check_imported_models(config: VerifyConfig) -> Iterator[tuple[str, str, str | None]]:
    """Check each imported model with its default configuration. Yield its name, the promise, and the problem if any."""
    from prior import Prior
    from prior.checks import check_prior, example_columns
    from tokenizer import TokenGrid, Tokenizer
    from tokenizer.checks import check_quantizer, check_tokenizer
    from tokenizer.quantizers import Quantizer

    grid = TokenGrid(tuple(config.grid), config.vocab_size)
    families: list[tuple[Any, dict[str, Any], Any]] = [
        (Prior, {"grid": grid, "num_classes": 2}, check_prior),
        (Quantizer, {}, check_quantizer),
        (Tokenizer, {"image_size": tuple(config.image_size), "channels": 1}, check_tokenizer),
    ]
    for family, facts, check in families:
        for name in family.available():
            if family.find(name).__module__.startswith(("prior.", "tokenizer.")):
                continue
            title = f"{family.__name__} {name}"
            takes_conditions = getattr(family.find(name).Config, "takes_conditions", False)
            columns = {"conditions": example_columns(grid)} if takes_conditions else {}
            try:
                for promise, problem in check(family.create(name, **facts, **columns)):
                    yield title, promise, problem
            except Exception as error:  # a model may raise anything; report it as the problem
                problem = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
                yield title, "it can be built with its defaults and checked", problem


main = partial(run_command, VerifyConfig, run, verb="verify", description=__doc__)
