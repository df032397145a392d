"""Upload a pipeline, a token dataset, or every pipeline of a folder of runs, to the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from tokenizer.files import HUB_ID, verify_manifest

from ..config import Config, UserError, Within, run_command
from ..config.outputs import check_out_folder
from ..files.hub import BUGS, PushError, refusal, require_reachable, said
from ..image_pipeline import ImagePipeline
from ..stages.index import INDEX
from ..stages.metadata import HUB_LICENCE
from ..stages.storing import as_stored, variant_of
from ..tokens import TokenDataset, load_tokens
from ..tokens.meta import META, TOKENS

PART = r"[A-Za-z0-9][\w.-]{0,95}"


class PushConfig(Config):
    """What is uploaded, and to where."""

    examples = ("folder=runs/gpt_digits/pipeline to=owner/name", "gallery=runs to=owner/prefix")

    folder: Annotated[str | None, Within("pipeline", INDEX)] = Field(
        None, description="a pipeline, or the run that trained it, or a token dataset"
    )
    gallery: str | None = Field(
        None, description="instead of `folder`, a folder of runs: each pipeline goes to a repository of its own"
    )
    to: str | None = Field(
        None,
        description="Hub id, owner/name; the repository is made if there is none. Of a gallery owner, or owner/prefix: "
        "the name of the run follows it",
    )
    private: bool = Field(True, description="whether a repository, or a collection, that is made is private")
    license: str | None = Field(
        None, description="the licence that the card names, as the Hub calls it (apache-2.0); null: as it is"
    )
    collection: str | None = Field(
        None, description="the title of a collection of the owner, made if there is none, that a gallery joins"
    )
    out: str | None = Field(None, description="instead of uploading it, write here what would be (token datasets)")

    @field_validator("license")
    @classmethod
    def _is_a_licence(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(HUB_LICENCE, name):
            raise ValueError(f"expected a name of small letters, digits, . and -, as apache-2.0 (got {name!r})")
        return name

    @model_validator(mode="after")
    def _goes_somewhere(self) -> PushConfig:
        if (self.folder is None) == (self.gallery is None):
            raise ValueError("folder, gallery: give one of the two")
        if (self.to is None) == (self.out is None):
            raise ValueError("to, out: give one of the two")
        form, told = (HUB_ID, "owner/name") if self.gallery is None else (f"{PART}(/{PART})?", "owner or owner/prefix")
        if self.to is not None and not re.fullmatch(form, self.to):
            raise ValueError(f"to: expected a Hub id of the form {told} (got {self.to!r})")
        if self.gallery is not None and self.out is not None:
            raise ValueError("out: is for token datasets; a pipeline is a folder that can be copied")
        if self.gallery is None and self.collection is not None:
            raise ValueError("collection: goes with gallery")
        return self


def run(config: PushConfig) -> str:
    """Upload, or write; returns the address or folder, of a gallery a line each. Raises `UserError` where the Hub says
    no."""
    try:
        places = push_gallery(config) if config.gallery else [push_one(config)]
    except PushError as error:
        raise UserError(f"to: {error}") from error
    return "\n".join(places)


def push_one(config: PushConfig) -> str:
    """Upload or write `folder`, and print where it is now."""
    folder = Path(str(config.folder))
    is_pipeline = (folder / INDEX).is_file()
    if not is_pipeline and not (folder / META).is_file():
        raise UserError(f"folder: {folder} is neither a pipeline (no {INDEX}) nor a token dataset (no {META})")
    if is_pipeline and config.out is not None:
        raise UserError("out: is for token datasets; a pipeline is a folder that can be copied")
    if not is_pipeline and config.license is not None:
        raise UserError("license: is for pipelines; a token dataset has that of the images it was made of")
    if config.out is not None:
        check_out_folder(config.out, TOKENS, [folder])
    if config.to is not None:
        require_reachable(config.to)  # before gigabytes are read
    item = pipeline_at(folder, config) if is_pipeline else load_tokens(folder, verify=True)
    where = str(config.out) if config.to is None else upload(item, folder, config.to, config.private)
    if isinstance(item, TokenDataset) and config.out is not None:
        item.to_parquet(config.out)
    print(where)
    return where


def pipeline_at(folder: Path, config: PushConfig) -> ImagePipeline:
    """The pipeline with its sample picture, its weights as they are stored, and the licence that was asked for."""
    pipeline = ImagePipeline.from_pretrained(folder)
    if pipeline.sample_grid is None:
        pipeline.sample_grid = pipeline.sample_picture()
    as_stored(pipeline)
    if config.license is not None:
        pipeline.provenance = {**pipeline.provenance, "license": config.license}
    return pipeline


def push_gallery(config: PushConfig) -> list[str]:
    """Upload every pipeline of `gallery`, printing where each is. All are read before the first is sent; what an error
    leaves out, the same command sends."""
    found = dict(pipelines_in(Path(str(config.gallery))))
    owner, _, prefix = str(config.to).partition("/")
    ids = {name: f"{owner}/{f'{prefix}-' if prefix else ''}{name}" for name in found}
    if strange := [repo_id for repo_id in ids.values() if not re.fullmatch(HUB_ID, repo_id)]:
        raise UserError(f"gallery: {strange[0]!r} is no Hub id; rename the folder")
    for folder in found.values():
        verify_manifest(folder)
    require_reachable(next(iter(ids.values())))
    places: list[str] = []
    for name, folder in found.items():
        try:
            places.append(upload(pipeline_at(folder, config), folder, ids[name], config.private))
        except PushError as error:
            sent = f"{len(places)} of {len(found)} pipelines are there; the same command sends the rest"
            raise UserError(f"to: {error}; {sent}") from error
        print(places[-1], flush=True)
    if config.collection is not None:
        places.append(collect(config.collection, owner, list(ids.values()), config.private))
        print(places[-1])
    return places


def pipelines_in(root: Path) -> Iterator[tuple[str, Path]]:
    """The pipelines of a folder of runs, or of pipelines, by the name of the folder in it. Raises `UserError` for
    none."""
    if not root.is_dir():
        raise UserError(f"gallery: there is no folder {root}")
    places = [(each.name, each / inner) for each in sorted(root.iterdir()) for inner in ("", "pipeline")]
    found = [(name, folder) for name, folder in places if (folder / INDEX).is_file()]
    if not found:
        raise UserError(f"gallery: {root} holds no pipeline (no RUN/pipeline/{INDEX}, no NAME/{INDEX})")
    yield from found


def collect(title: str, owner: str, repo_ids: list[str], private: bool) -> str:
    """Put repositories into a collection, which is made if there is none; returns its address. Raises `PushError`."""
    from huggingface_hub import HfApi

    try:
        collection = HfApi().create_collection(title, namespace=owner, private=private, exists_ok=True)
        for repo_id in repo_ids:
            HfApi().add_collection_item(collection.slug, repo_id, "model", exists_ok=True)
    except BUGS:
        raise
    except Exception as error:  # as for uploads, of many kinds
        raise refusal(f"the collection {title!r} of {owner}", said(error)) from error
    return str(collection.url)


def upload(item: Any, folder: Path, repo_id: str, private: bool) -> str:
    """Push the pipeline, or token dataset, that is in `folder`; returns its address. Raises `PushError`."""
    from huggingface_hub import constants

    is_pipeline = isinstance(item, ImagePipeline)
    item.push_to_hub(repo_id, private=private, **({"variant": variant_of(folder)} if is_pipeline else {}))
    kind = "" if is_pipeline else "datasets/"
    return f"{constants.ENDPOINT}/{kind}{repo_id}"


main = partial(run_command, PushConfig, run, verb="push", description=__doc__)


if __name__ == "__main__":
    main()
