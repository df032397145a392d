"""Which images are trained on, validated on and held out.

A unit (an image, an object, a clip or a shard) goes to a part by the hash of its name: below one threshold it is held
out, above another it is for validation. Both are chosen once, midway between two hashes, so that the numbers are exact
on that day, and are stored in `splits.json`. Images that are added later fall to a part by their own hash, and never
move others. Runs of 0.3 have no such file; they take the number of a unit in sorted order for its name.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from tokenizer.config import show_value
from tokenizer.files import FormatError, check_format_version, quote, read_json
from tokenizer.model import SPLITS

from ..config import UserError, is_first_process, tell, user_errors
from ..files import validate
from ..shuffling import Positions, splitmix64
from .settings import UNIT_SETTINGS, DataConfig, Unit
from .sources import Hashes, Source, SourceSplits, hash_names

SPLITS_KEY, FORMAT_VERSION = "splits", 1
VALIDATION_NAMES = ("validation", "val", "valid", "dev")  # to evaluate on if there is no `test`
SHARE, LEAST, MOST = 0.05, 10, 2000
"""Share of the training split for validation, and its limits: fewer than 10 images would select a model by chance, and
evaluation during training uses at most 2,000."""
HASHES = 1 << 64
SAMPLED = 64
"""Hashes of names that a file keeps to recognise the source at another place: they miss half of the same images once in
2^64 times, and a twentieth once in 30."""
DIVIDED_ANEW = "whether images of {} were trained on is not known; it is divided anew"
SHARD_COUNT = re.compile(r"-of-\d+(?=\.|$)")
PARTS = ("train", "validation", "held_out")
DIVISION = ("split", "held_out", "held_out_fraction", "validation_fraction", *UNIT_SETTINGS, "key")
"""The settings that decide which images of a source are trained on; `limit` takes some of each part."""

NamedBy = Literal["path", "column", "expression", "bytes", "pixels", "position"]
NAME_ORIGINS: dict[Unit, tuple[NamedBy, ...]] = {
    "image": ("path", "column", "bytes", "pixels"),
    "object": ("column", "expression"),
    "clip": ("path",),
    "folder": ("path",),
    "shard": ("path",),
}
NAMED: dict[NamedBy, str] = {
    "path": "their paths",
    "column": "a column",
    "expression": "an expression",
    "bytes": "their bytes",
    "pixels": "their pixels",
    "position": "their positions",
}


# What is stored


class PartFacts(BaseModel):
    """The size of a part, and a hash of the names in it (empty in published files)."""

    units: Annotated[int, Strict(), Field(ge=0)]
    images: Annotated[int, Strict(), Field(ge=0)] | None = None  # unknown for streams
    digest: str = ""


class SplitFacts(BaseModel):
    """How a source was divided: the contents of `splits.json`.

    unit, by: what is never divided, and where its name comes from. held_out_split: the source's own split that is held
    out, or None. held_out_below, validation_from: hashes, None if no unit is below or above. sample: the lowest hashes
    of all units' hashes.
    """

    model_config = ConfigDict(frozen=True)

    format_version: int = FORMAT_VERSION
    unit: Unit
    by: NamedBy
    held_out_split: str | None = None
    held_out_below: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None
    validation_from: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None
    parts: dict[Literal["train", "validation", "held_out"], PartFacts]
    sample: list[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]] = Field([], max_length=SAMPLED)

    @model_validator(mode="after")
    def _is_a_partition(self) -> SplitFacts:
        if (self.held_out_split is None) == (self.held_out_below is None):
            raise ValueError("held_out_below: must be set exactly if no split of the source is held out")
        if (self.held_out_below or "0") > (self.validation_from or "g"):
            raise ValueError("held_out_below and validation_from cross")
        if self.by not in NAME_ORIGINS[self.unit]:
            raise ValueError(f"by: {self.unit}s are not named by {self.by}")
        return self

    @property
    def rule(self) -> tuple[str | None, ...]:
        return self.unit, self.by, self.held_out_split, self.held_out_below, self.validation_from

    @property
    def thresholds(self) -> tuple[int, int]:
        """The hashes below which units are held out, and from which they are for validation."""
        below, start = self.held_out_below, self.validation_from
        return 0 if below is None else int(below, 16), HASHES if start is None else int(start, 16)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)

    def describe(self) -> str:
        """Return a line such as "411 objects: 349 train, 21 validation, 41 held out"."""
        counts = {
            name: part.images if self.unit == "image" and part.images is not None else part.units  # some may be equal
            for name, part in self.parts.items()
        }
        total = sum(counts.values())
        parts = (f"{counts[name]:,} {name.replace('_', ' ')}" for name in PARTS if name in counts)
        return f"{total:,} {self.unit}{'s' * (total != 1)}: {', '.join(parts)}"


def read_splits(path: Path) -> SplitFacts | None:
    """Read a `splits.json`; None if there is none. Raises `FormatError`."""
    if not path.is_file():
        return None
    found = read_json(path)
    check_format_version(found, FORMAT_VERSION, path)
    return validate(SplitFacts, found, path)


def split_off(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts about a model to write beside `splits.json`: in place of its contents, its name, which shows if
    it is missing."""
    return {key: SPLITS if key == SPLITS_KEY else value for key, value in facts.items()}


def join_splits(facts: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the facts about a model with the contents of its `splits.json`. Raises `FormatError` if it is missing,
    because without it the images would be divided as in 0.3."""
    found = read_splits(path)
    if found is None and SPLITS_KEY in facts:
        raise FormatError(f"{path}: missing; it says which images were held out, restore it or train again")
    return facts if found is None else {**facts, SPLITS_KEY: found.to_dict()}


def publish_splits(found: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object of `SplitFacts` without what tells something of the names of images."""
    parts = {name: {**part, "digest": ""} for name, part in found.get("parts", {}).items()}
    return {key: value for key, value in found.items() if key != "sample"} | {"parts": parts}


@dataclass(frozen=True)
class Inherited:
    """The division of training. rule: what divides the images, "position" for a run of 0.3, None to divide them anew.
    same_source: whether the images come from the place that was trained on. note: what is not known about the division.
    refusal: why it must not be used if the images of another place are those of training. regroup: divide other units
    anew."""

    rule: SplitFacts | Literal["position"] | None
    same_source: bool = True
    note: str | None = None
    refusal: str | None = None
    regroup: bool = False

    @property
    def facts(self) -> SplitFacts | None:
        return self.rule if isinstance(self.rule, SplitFacts) else None

    @property
    def by(self) -> NamedBy | None:
        """Where the names of units come from; None to choose."""
        if self.facts is None:
            return "position" if self.rule == "position" else None
        return self.facts.by if self.refusal is None else None


def inherit_splits(
    config: DataConfig,
    trained: DataConfig | None,
    facts: SplitFacts | None,
    same_source: bool,
    *,
    regroup: bool = False,
) -> Inherited:
    """Return how to divide `config`, given the settings `trained` and the `facts` of an earlier step. regroup: allow
    other units (objects instead of images, images instead of shards), by which images are divided anew.

    Raises `UserError` for other settings of a source that was divided."""
    if trained is None:
        return Inherited(None, False, f"whether images of {config.source} were trained on is not recorded")
    if facts is None:
        return Inherited("position") if same_source else Inherited(None, False, DIVIDED_ANEW.format(config.source))
    ours, theirs = (
        # Clips are held out whole, whatever their windows.
        {key: getattr(each, key) for key in DIVISION} | {"frames": each.frames is not None}
        for each in (config, trained)
    )
    changed = [key for key in DIVISION if ours[key] != theirs[key]]
    if not changed:
        return Inherited(facts, same_source, regroup=regroup)
    if regroup and same_source and not set(UNIT_SETTINGS).isdisjoint(changed):
        return Inherited(None)
    before = " ".join(f"data.{key}={show_value(getattr(trained, key))}" for key in changed)
    refusal = (
        f"{', '.join(f'data.{key}' for key in changed)}: {config.source} was divided with {before} for training, and "
        "stays so; keep that setting, or begin a new run"
    )
    if same_source:
        raise UserError(refusal)
    return Inherited(facts, False, refusal=refusal, regroup=regroup)


# Names and their hashes


class Units(NamedTuple):
    """The units of the rows of a split: their kind, where names come from, and the hash of each row's unit."""

    unit: Unit
    by: NamedBy
    hashes: Hashes


def hash_units(source: Source, config: DataConfig, by: NamedBy | None = None) -> Units:
    """Return the units of the images of a source. by: where the names came from earlier; None chooses. Raises
    `UserError` if there are no such names."""
    if by == "position":
        numbers = np.arange(source.size)
        if config.unit != "image":
            numbers = np.unique(name_units(source.paths, config), return_inverse=True)[1]
        return Units(config.unit, by, splitmix64(numbers.astype(np.uint64)))
    if config.group is not None:
        column = source.objects if by != "expression" else None
        if column is None and source.paths is None:
            raise UserError(f"data.group: needs a folder of images, or a column {config.group!r} in their table")
        if column is None and by == "column":
            raise UserError(f"data.group: the images lack the column {config.group!r} of the objects in training")
        names = column if column is not None else name_units(source.paths, config)
        return Units("object", "expression" if column is None else "column", hash_names(names))
    if source.paths is not None:
        if config.key is not None:
            raise UserError(f"data.key: names rows of tables; the images of {config.source} are known by their paths")
        return Units(config.unit, "path", hash_names(name_units(source.paths, config)))
    require_single_images(config)
    assert source.identity is not None
    own, hashes = source.identity
    if config.key is not None and own != "column":
        raise UserError(f"data.key: names rows of tables; the images of {config.source} are known by their {own}")
    return Units("shard" if source.holds_shards else "image", own, hashes())


def hash_images(source: Source, units: Units, config: DataConfig) -> Hashes:
    if units.by == "position" or units.unit == "image":
        return units.hashes
    return hash_names(list_paths_within(source.paths, config)) if source.identity is None else source.identity.hashes()


def name_units(paths: list[str] | None, config: DataConfig) -> list[str]:
    """Return the name of each image's unit: its folder with `data.clips`, the object in its path with `data.group`, and
    otherwise its own path, which with `data.frames` is that of a clip. Raises `UserError` if images are not files."""
    if paths is None:
        require_single_images(config)
    within = list_paths_within(paths, config)
    if config.group is not None:
        return find_objects(within, config.group)
    return [os.path.dirname(path) for path in within] if config.unit == "folder" else within


def find_objects(names: list[str], pattern: str) -> list[str]:
    """Return the object in each image's path: the first group of the `pattern`, or the whole match without groups.
    Raises `UserError` for a path in which there is none."""
    prefix = f"data.group: invalid regular expression {quote(pattern)}: "
    with user_errors(re.error, RecursionError, OverflowError, prefix=prefix):
        search, found = re.compile(pattern), list[str]()
    for name in names:
        match = search.search(name)
        text = match[min(1, search.groups)] if match else None
        if not text:
            raise UserError(f"data.group: '{pattern}' finds no object in {name}")
        found.append(text)
    return found


def require_single_images(config: DataConfig) -> None:
    if config.unit != "image":
        key, more = ("clips", ", with a folder for each clip") if config.unit == "folder" else ("group", "")
        raise UserError(f"data.{key}: needs a folder of images{more}")


def list_paths_within(paths: Sequence[str] | None, config: DataConfig) -> list[str]:
    root = "" if config.path is None else os.path.join(config.path, "")
    return [path.removeprefix(root).replace(os.sep, "/") for path in paths or []]


def name_shards(files: list[str], config: DataConfig) -> list[str]:
    """Return the names of shards within the source, without their number (`-of-NNNNN`), which changes when shards are
    added."""
    fixed = re.split(r"[*?[]", os.path.expanduser(config.source), maxsplit=1)[0]
    is_folder = config.path is not None and config.path.is_dir()
    root = os.path.join(config.path or "", "") if is_folder else os.path.join(os.path.dirname(fixed), "")
    root = root if "://" in root else os.path.join(os.path.abspath(root), "")
    within = [(file if "://" in file else os.path.abspath(file)).removeprefix(root) for file in files]
    within = [re.sub(r"^hf://datasets/[^@]*@[^/]*/", "", name) for name in within]
    return [SHARD_COUNT.sub("", name.partition("?")[0] if "://" in name else name) for name in within]


# Division


class SplitPart(NamedTuple):
    """Some images of a source, and the hash of the unit of each of its images."""

    source: Source
    positions: Positions
    units: Hashes


@dataclass(frozen=True)
class Division:
    """The parts of a source by name. facts: None if it is divided by position. note: what is known to have changed
    since training, or is unknown; None if nothing. is_carved: whether images are held out of the split to train on."""

    parts: dict[str, SplitPart]
    facts: SplitFacts | None
    note: str | None
    is_carved: bool


def divide_images(
    splits: SourceSplits, config: DataConfig, inherited: Inherited | None = None, quiet: bool = False
) -> Division:
    """Divide a source into `train`, `held_out` and, if any, `validation`. inherited: the division of training. quiet:
    do not print notes about splits. Raises `UserError`."""
    if config.split not in splits:
        raise UserError(f"data.split: the source has no split {config.split!r}; it has {', '.join(splits)}")
    inherited = inherited or Inherited(None)
    facts, note = inherited.facts, inherited.note

    def open_units(name: str, by: NamedBy | None) -> tuple[Source, Units]:
        source = splits[name]()
        units = hash_units(source, config, by)
        return source if units.by == "column" else replace(source, objects=None), units  # an expression finds them

    source, units = open_units(config.split, inherited.by)
    if facts is not None:
        facts, note = compare_source(facts, inherited, units, splits, config)
    own = choose_held_out(splits, config) if facts is None else facts.held_out_split
    thresholds = facts.thresholds if facts is not None else choose_thresholds(source, units, config, own is None)
    below, above = is_below(units.hashes, thresholds[0]), ~is_below(units.hashes, thresholds[1])
    chosen = {"train": ~below & ~above, "validation": above & ~below, "held_out": below}
    parts = {name: SplitPart(source, np.flatnonzero(mask), units.hashes) for name, mask in chosen.items()}
    names = {source: units}
    if own is not None:
        other, names_there = open_units(own, units.by)
        parts["held_out"], names[other] = SplitPart(other, np.arange(other.size), names_there.hashes), names_there
    if not quiet:
        some = f"{100 * config.held_out_fraction:.3g}% of {'the shards of ' * source.holds_shards}{config.split!r}"
        report_splits(splits, config, own, some)
        known = np.unique(parts["held_out"].units)
        both = int(np.isin(known, units.hashes).sum()) if own is not None and units.by != "position" else 0
        if both and is_first_process():
            tell(f"warning: {both:,} of {len(known):,} {units.unit}s of {own!r} are also in {config.split!r}")
    require_images(parts, facts, units, config, own)
    parts = {name: part for name, part in parts.items() if len(part.positions)}
    now = None if units.by == "position" else describe_parts(parts, units, own, thresholds)
    if facts is not None and now is not None:
        note = describe_change(facts, now, units, config, inherited.same_source)
    if config.limit is not None and not source.holds_shards:
        hashes = {each: hash_images(each, theirs, config) for each, theirs in names.items()}
        parts = {name: limit_part(part, hashes[part.source], units.by, config.limit) for name, part in parts.items()}
    return Division(parts, now, note, own is None)


def choose_thresholds(source: Source, units: Units, config: DataConfig, is_carved: bool) -> tuple[int, int]:
    """Return the thresholds of a source that is divided for the first time; see `find_thresholds`. is_carved: hold out
    some of its units. Raises `UserError` for a stream that would have no shards to train on."""
    distinct, fraction = np.unique(units.hashes), config.validation_fraction
    held_out = max(1, round(len(distinct) * config.held_out_fraction)) if is_carved else 0
    if not source.holds_shards:
        validation = -(-validation_count(source.size, fraction) * len(distinct) // max(1, source.size))
    else:  # of an unknown number of images
        validation = max(round((SHARE if fraction is None else fraction) * len(distinct)), int(bool(fraction)))
        if held_out + validation >= len(distinct):
            raise UserError(
                f"data.streaming: {config.source} has {len(distinct)} shards in {config.split!r}, and "
                f"{held_out + validation} would be held out; make more and smaller shards, or a split 'test'"
            )
    return find_thresholds(distinct, held_out, validation)


def compare_source(
    facts: SplitFacts, inherited: Inherited, units: Units, splits: SourceSplits, config: DataConfig
) -> tuple[SplitFacts | None, str | None]:
    """Return the facts of an earlier division if they divide this source, too, or else None and what is not known then.
    Raises `UserError` if they should, but cannot."""
    is_comparable, own = (facts.unit, facts.by) == (units.unit, units.by), facts.held_out_split
    if inherited.same_source or is_comparable and shares_units(facts, units):
        if inherited.refusal:
            raise UserError(f"{inherited.refusal} (it has images of the names that were trained on)")
        if "shard" in (facts.unit, units.unit) and inherited.regroup and not is_comparable:  # a stream and its copy
            return None, inherited.note
        if not is_comparable:
            ours, theirs = (f"{one.unit}s, named by {NAMED[one.by]}" for one in (units, facts))
            raise UserError(
                f"{SPLITS}: divides {theirs}, but {config.source} has {ours}; it belongs to another source, or "
                "data.group or data.streaming has changed"
            )
        if own is not None and own not in splits:
            there = ", ".join(splits)
            raise UserError(f"data.held_out: the split {own!r} of training is gone; {config.source} has {there}")
        return facts, inherited.note
    if is_comparable and facts.sample:
        return None, f"{config.source} is not the source of training, and is divided anew"
    below, start = facts.thresholds
    train = ~is_below(units.hashes, below) & is_below(units.hashes, start)
    has_both = train.any() and ((~train).any() if own is None else own in splits)
    if inherited.refusal or not is_comparable or not has_both:
        return None, DIVIDED_ANEW.format(config.source)
    return facts, inherited.note


def find_thresholds(units: Hashes, held_out: int, validation: int) -> tuple[int, int]:
    """Return the hashes below which `held_out` of the sorted distinct `units` lie, and from which `validation` do, or
    all that are left if these are fewer. They lie midway between two hashes."""

    def midway(count: int) -> int:
        if count >= len(units):
            return HASHES
        low, high = int(units[count - 1]) if count else -1, int(units[count])
        return low + (high - low + 1) // 2

    return midway(held_out) if held_out else 0, midway(max(held_out, len(units) - validation))


def is_below(hashes: Hashes, threshold: int) -> NDArray[np.bool_]:
    return np.ones(len(hashes), bool) if threshold >= HASHES else hashes < np.uint64(threshold)


def limit_part(part: SplitPart, hashes: Hashes, by: NamedBy, limit: int) -> SplitPart:
    """Return at most `limit` images of a part, by their hashes; in runs of 0.3 the first."""
    if len(part.positions) <= limit:
        return part
    if by == "position":
        return part._replace(positions=part.positions[:limit])
    order = np.argsort(splitmix64(hashes[part.positions]), kind="stable")  # hashed again, as parts are ranges of hashes
    return part._replace(positions=np.sort(part.positions[order[:limit]]))


def describe_parts(
    parts: dict[str, SplitPart], units: Units, held_out_split: str | None, thresholds: tuple[int, int]
) -> SplitFacts:
    """Return what is stored about a division."""
    distinct = {name: np.unique(part.units[part.positions]) for name, part in parts.items()}
    below, start = (None if value in (0, HASHES) else f"{value:016x}" for value in thresholds)
    lowest = np.sort(splitmix64(np.unique(np.concatenate(list(distinct.values())))))[:SAMPLED]
    return SplitFacts(
        unit=units.unit,
        by=units.by,
        held_out_split=held_out_split,
        held_out_below=below,
        validation_from=start,
        parts={
            name: PartFacts(
                units=len(distinct[name]),
                images=None if units.unit == "shard" else len(part.positions),
                digest=hashlib.sha256(distinct[name].astype(">u8").tobytes()).hexdigest(),
            )
            for name, part in parts.items()
        },
        sample=[f"{value:016x}" for value in lowest.tolist()],
    )


# What has changed


def shares_units(facts: SplitFacts, units: Units) -> bool:
    return bool(set(facts.sample) & {f"{value:016x}" for value in splitmix64(units.hashes).tolist()})


def require_images(
    parts: dict[str, SplitPart], facts: SplitFacts | None, units: Units, config: DataConfig, own: str | None
) -> None:
    """Raise `UserError` if no images are left to train on or to evaluate on."""
    for part, name in (("train", config.split), ("held_out", own or "held_out")):
        if len(parts[part].positions):
            continue
        if facts is not None:
            before = facts.parts.get(part, PartFacts(units=0))  # type: ignore[call-overload]
            was = "held out" if part == "held_out" else "trained on"
            raise UserError(
                f"data: the {before.units:,} {facts.unit}s of {config.source} that were {was} are gone; put them back, "
                "use other images (data.source=FOLDER), or begin a new run"
            )
        source, kind = parts["train"].source, None if units.unit == "image" else units.unit
        whole = f"; whole {kind}s are held out, and it has {len(np.unique(units.hashes))}" if kind else ""
        if units.unit == "image" and len(np.unique(units.hashes)) == 1 < source.size:
            whole = f"; all {source.size} images are the same{' in data.key' if units.by == 'column' else ''}"
        raise UserError(f"data: no images left for {name!r} (the split {config.split!r} has {source.size}{whole})")


def describe_change(
    then: SplitFacts, now: SplitFacts, units: Units, config: DataConfig, same_source: bool
) -> str | None:
    """Return what has changed since training, or is not known, in a line; None if nothing has. units: those that are
    there now."""
    held_out = now.parts["held_out"]
    if not (same_source or then.sample):  # published files do not know names
        return (
            f"whether images of {config.source} were trained on under other names is not known; "
            f"{held_out.images or held_out.units:,} are held out by their names, as in training"
        )
    before, after = (sum(part.images or part.units for part in facts.parts.values()) for facts in (then, now))
    what = "images" if held_out.images is not None else f"{now.unit}s"
    digests = {name: part.digest for name, part in then.parts.items()}
    if before != after:
        found = f"{after:,} {what} instead of {before:,}"
    elif any(digests.get(name, part.digest) not in ("", part.digest) for name, part in now.parts.items()):
        found = f"still {after:,} {what}, but other names; renamed ones may have been trained on under their old names"
    else:
        return None
    if then.sample and not shares_units(then, units):
        found += ", none of which is known"
    return f"{config.source} has changed since training: {found}; {held_out.images or held_out.units:,} are held out"


# The splits of a source


def choose_held_out(names: Collection[str], config: DataConfig) -> str | None:
    """Return the split among `names` to evaluate on; None to hold out part of `config.split`.

    Raises `UserError` if `config.held_out` names a missing split other than `test`; a missing `test` means None.
    """
    others, wanted = [name for name in names if name != config.split], config.held_out
    if wanted is None:
        found = ["test"] if "test" in others else [name for name in VALIDATION_NAMES if name in others]
        return found[0] if len(found) == 1 else None
    if wanted in others:
        return wanted
    if wanted != "test":
        near = difflib.get_close_matches(wanted, others, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        part = "" if "test" in others else f" (data.held_out=test holds out part of {config.split!r})"
        raise UserError(f"data.held_out: no split {wanted!r}; {config.source} has {', '.join(names)}{hint}{part}")
    return None


def report_splits(names: Collection[str], config: DataConfig, found: str | None, part: str) -> None:
    """Print which images replace a missing `test` split and which splits are unused, unless the choice is usual or was
    configured. part: describes the images held out if no split was `found`."""
    left, missing = [name for name in names if name not in (config.split, found)], config.held_out or "test"
    is_configured, is_usual = config.held_out is not None and found is not None, found in (None, "test") and not left
    if is_configured or is_usual or not is_first_process():
        return
    why = "" if found == "test" else "as in training, " if missing in left else f"there is no {missing!r}, so "
    rest = f"; not used: {', '.join(left)}" if left else ""
    remedy = " (data.held_out=NAME chooses another)" if left else ""
    taken = part if found is None else repr(found)
    tell(f"data.held_out: {config.source}: {why}{taken} is held out{rest}{remedy}")


def validation_count(size: int, fraction: float | None) -> int:
    """Return the number of validation images in a training split of `size` images; see `DataConfig`."""
    if fraction is None:
        count = min(round(SHARE * size), MOST)
        return count if count >= LEAST else 0
    return max(1, round(fraction * size)) if fraction else 0
