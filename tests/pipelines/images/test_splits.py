"""Splits: which images are trained on, used for validation, and held out.

Covers: pipelines/images/splits.py, pipelines/images/unseen.py.
"""

import json
import os
import re
import shutil
from itertools import product

import numpy as np
import pytest
from givens.images import (
    PNGS,
    bytes_of_each,
    config,
    encoded,
    noise,
    rows_of,
    write_image,
    write_rows,
    write_shards,
    write_splits,
    write_table,
    write_tar,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import needs_digits

from pipelines.config import UserError
from pipelines.images import DataConfig, load_images
from pipelines.images.sources import hash_names
from pipelines.images.splits import (
    Inherited,
    SplitFacts,
    find_thresholds,
    inherit_splits,
    is_below,
    publish_splits,
    read_splits,
)
from pipelines.images.streaming import divide_files
from pipelines.images.unseen import require_unseen
from pipelines.shuffling import splitmix64
from tokenizer.files import FormatError


def images_by_split(settings):
    return {name: bytes_of_each(part) for name, part in load_images(settings).by_name().items()}


# Parts of one split


@settings(deadline=None)
@given(st.data())
def test_thresholds_are_exact_on_the_day(data):
    """As many units are held out, and are for validation, as are wanted; if these are too many, fewer for
    validation."""
    hashes = data.draw(st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**64 - 1)), min_size=1, unique=True))
    units = np.sort(np.array(hashes, np.uint64))
    held_out, validation = (data.draw(st.integers(0, len(units))) for _ in range(2))
    below, start = find_thresholds(units, held_out, validation)
    assert int(is_below(units, below).sum()) == held_out
    assert int((~is_below(units, start)).sum()) == min(validation, len(units) - held_out)
    assert find_thresholds(units, held_out, 0)[0] == below
    if 0 < held_out < len(units):  # midway, so that an added unit falls to a part with the part's share
        gap = int(units[held_out]) - int(units[held_out - 1])
        assert (below - int(units[held_out - 1])) in (gap // 2, -(-gap // 2))


@pytest.mark.parametrize("group", [None, r"^(..)"])
def test_runs_of_0_3_divide_by_position(tmp_path, group):
    """As `carve` did in 0.3: the order of the hashes of positions, and `limit` from the front."""
    paths = [write_image(tmp_path / f"{k:03}.png", noise(12, 12, seed=k)) for k in range(60)]
    options = {"held_out_fraction": 0.3, "validation_fraction": 0.2, "group": group}
    groups = np.array([k // 10 for k in range(60)]) if group else np.arange(60)
    total = int(groups.max()) + 1
    held_out, validation = round(0.3 * total), -(-12 * total // 60)
    order = np.argsort(splitmix64(np.arange(total, dtype=np.uint64)), kind="stable")
    chosen = {"train": order[held_out : total - validation], "validation": order[total - validation :]}
    chosen["held_out"] = order[:held_out]
    for limit in (None, 5):
        splits = load_images(config(tmp_path, limit=limit, **options), inherited=Inherited("position"))
        for name, part in splits.by_name().items():
            wanted = [os.path.basename(paths[k]) for k in np.flatnonzero(np.isin(groups, chosen[name]))[:limit]]
            assert part.names(range(len(part))) == wanted
        assert splits.facts is None


# Names


def write_objects_table(path, numbers, **columns):
    """Write a parquet file of distinct images with their number, and object, as columns."""
    import datasets

    images = [{"bytes": encoded(noise(12, 12, seed=k)), "path": None} for k in numbers]
    features = {"image": datasets.Image(), "name": datasets.Value("string"), "thing": datasets.Value("int64")}
    rows = {"image": images, "name": [f"n{k}" for k in numbers], "thing": [k // 3 for k in numbers]}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)


def write_named(folder, kind, numbers):
    """Write images with these numbers, in their order, as a source of this kind, and return its settings."""
    if folder.exists():
        shutil.rmtree(folder)
    options = {"held_out_fraction": 0.3, "validation_fraction": 0.2}
    options |= {
        "objects": {"group": r"(\d\d\d)\d\.png"},
        "sheet": {"group": "thing"},
        "clips": {"clips": True},
        "windows": {"frames": 2},
        "parquet key": {"key": "name"},
        "parquet objects": {"group": "thing"},
    }.get(kind, {})
    if kind.startswith("parquet"):
        write_objects_table(folder / "train.parquet", numbers)
    elif kind == "tar":
        write_tar(folder / "train.tar", [(f"{k:04}", encoded(noise(12, 12, seed=k)), None) for k in numbers])
    elif kind == "windows":
        for clip, k in product(sorted({k // 3 for k in numbers}), range(4)):
            write_image(folder / f"clip{clip:04}/{k}.png", noise(12, 12, seed=[clip, k]))
    else:
        for k in numbers:
            write_image(
                folder / (f"clip{k // 3:04}" if kind == "clips" else ".") / f"{k:04}.png", noise(12, 12, seed=k)
            )
    if kind == "sheet":
        write_rows(folder / "metadata.csv", [{"file_name": f"{k:04}.png", "thing": f"thing{k // 3}"} for k in numbers])
    return config(folder, **options)


def parts_of(settings, inherited=None):
    """The facts, and the part of each image by its content."""
    splits = load_images(settings, inherited=inherited)
    found = {image: name for name, part in splits.by_name().items() for image in bytes_of_each(part)}
    return splits, found


SOURCES = ["folder", "objects", "sheet", "clips", "windows", "parquet", "parquet key", "parquet objects", "tar"]


@pytest.mark.parametrize("kind", SOURCES)
def test_added_and_removed_images_move_no_others(tmp_path, kind):
    numbers = list(range(200, 290))
    splits, before = parts_of(write_named(tmp_path / "a", kind, numbers))
    assert set(before.values()) == {"train", "validation", "held_out"} and splits.facts is not None
    assert len(splits.train) + len(splits.validation) + len(splits.held_out) == len(before)
    for changed in ([0, *numbers], [*range(100), *numbers, 300], numbers[:45] + numbers[48:], [7, *numbers[3:]]):
        settings = write_named(tmp_path / "a", kind, changed)
        after, found = parts_of(settings, Inherited(splits.facts))
        assert {image: part for image, part in found.items() if image in before}.items() <= before.items()
        if len(found) != len(before):
            assert "has changed since training: " in str(after.note)
        again, same = parts_of(settings, Inherited(after.facts))
        assert again.note is None and again.facts == after.facts and same == found


def test_a_renamed_image_is_a_new_one_and_that_is_said(tmp_path):
    settings = write_named(tmp_path / "a", "folder", range(60))
    splits, before = parts_of(settings)
    (tmp_path / "a/0003.png").rename(tmp_path / "a/x.png")
    after, found = parts_of(settings, Inherited(splits.facts))
    assert "still 60 images, but other names" in str(after.note)
    image = noise(12, 12, seed=3).tobytes()
    assert {key: part for key, part in found.items() if key != image} == {k: v for k, v in before.items() if k != image}


def test_a_limit_takes_images_of_each_part_by_hash_wherever_they_lie(tmp_path):
    settings = write_named(tmp_path / "a", "folder", range(200, 290))
    limit, parts = settings.model_copy(update={"limit": 20}), images_by_split(settings)
    before = load_images(limit)
    limited = {name: set(bytes_of_each(part)) for name, part in before.by_name().items()}
    assert all(limited[name] <= set(part) and len(limited[name]) == min(20, len(part)) for name, part in parts.items())
    assert limited["train"] != set(parts["train"][:20])  # classes keep their shares
    assert before.facts == load_images(settings).facts  # what is stored does not depend on it
    write_named(tmp_path / "a", "folder", [*range(3), *range(200, 290)])  # three that sort first
    after = load_images(limit, inherited=Inherited(before.facts))
    assert len(limited["train"] - set(bytes_of_each(after.train))) <= 3


def test_a_copy_elsewhere_is_recognised_and_another_source_is_divided_anew(tmp_path):
    splits, before = parts_of(write_named(tmp_path / "a", "folder", range(60)))
    moved, found = parts_of(write_named(tmp_path / "b", "folder", range(70)), Inherited(splits.facts, False))
    assert found.items() >= before.items() and "70 images instead of 60" in moved.note
    other = write_named(tmp_path / "c", "folder", range(500, 560))
    fresh, _ = parts_of(other, Inherited(splits.facts, False))
    assert fresh.facts == load_images(other).facts and "not the source of training" in fresh.note
    grown, _ = parts_of(write_named(tmp_path / "d", "folder", range(2000)), Inherited(splits.facts))
    assert "none of which is known" not in grown.note  # though none of the lowest hashes is that of an old one
    renamed, _ = parts_of(other.model_copy(), Inherited(splits.facts))
    assert "none of which is known" in renamed.note


def test_a_copy_elsewhere_is_held_to_the_division(tmp_path):
    """Otherwise images that were trained on would be held out."""
    then = write_named(tmp_path / "a", "folder", range(60))
    splits = load_images(then)
    copied = write_named(tmp_path / "b", "folder", range(60))
    now = copied.model_copy(update={"held_out_fraction": 0.5})
    with pytest.raises(UserError, match=r"^data.held_out_fraction: .* was divided with data.held_out_fraction=0.3"):
        load_images(now, inherited=inherit_splits(now, then, splits.facts, False))
    for name in splits.held_out.names(range(len(splits.held_out))):
        (tmp_path / "b" / name).unlink()
    with pytest.raises(UserError, match=r"^data: the 18 images of .* that were held out are gone"):
        load_images(copied, inherited=inherit_splits(copied, then, splits.facts, False))
    for kind in ("objects", "parquet"):  # other units, which cannot be compared
        other = write_named(tmp_path / "c", kind, range(60))
        found = load_images(other, inherited=inherit_splits(other, then, splits.facts, False))
        assert "were trained on is not known; it is divided anew" in found.note
        assert found.facts == load_images(other).facts
    public = SplitFacts.model_validate(publish_splits(splits.facts.to_dict()))
    found = load_images(then, inherited=Inherited(public, False))
    assert found.facts == splits.facts and "under other names is not known; 18 are held out" in found.note


def test_shards_are_divided_by_name_without_their_number(tmp_path):
    """More shards change the count in all names."""

    def files_of(count, inherited=None):
        write_shards(tmp_path / str(count), "tar", rows_of(2 * count, size=12), count)
        found = divide_files(config(tmp_path / str(count), streaming=True, validation_fraction=0.2), inherited)
        names = {
            name: {os.path.basename(part.source.name(k)).partition("-of-")[0] for k in part.positions.tolist()}
            for name, part in found.parts.items()
        }
        return found, names

    division, before = files_of(20)
    assert division.facts.unit == "shard" and sorted(map(len, before.values())) == [2, 4, 14]
    grown, after = files_of(30, Inherited(division.facts))
    assert all(after[name] >= part for name, part in before.items())
    assert "30 shards instead of 20" in grown.note


def test_names_of_shards_do_not_depend_on_how_a_source_is_written(tmp_path, monkeypatch):
    found = []
    for place in ("a", "b"):
        write_shards(tmp_path / place, "tar", rows_of(20, size=12), 10)
        monkeypatch.chdir(tmp_path / place)
        for source in (".", tmp_path / place, "./train-0000?-*.tar", "train-[0-9]*.tar", f"../{place}/*.tar"):
            found.append(divide_files(config(source, streaming=True)).facts)
    assert all(facts == found[0] for facts in found)


def test_a_copy_of_a_stream_is_divided_anew_for_tokens_only(tmp_path):
    """By images instead of shards."""
    write_shards(tmp_path, "parquet", rows_of(40), 8)
    stream, copied = (config(tmp_path, streaming=streaming) for streaming in (True, False))
    facts = load_images(stream, stream=True).facts
    tokens = load_images(copied, inherited=inherit_splits(copied, stream, facts, True, regroup=True))
    assert tokens.facts == load_images(copied).facts and tokens.note is None
    with pytest.raises(UserError, match="^splits.json: divides shards, .* data.streaming has changed$"):
        load_images(copied, inherited=inherit_splits(copied, stream, facts, True))


def test_any_name_has_a_hash(tmp_path):
    """Also one that is not Unicode, and equal ones in different normal forms."""
    hashes = hash_names(["a", "\ud800", "\u00e9", "e\u0301"]).tolist()
    assert len(set(hashes)) == 3 and hashes[2] == hashes[3]
    for number in range(10):
        path = os.fsencode(tmp_path) + b"/\xff%d.png" % number
        with open(path, "wb") as file:
            file.write(PNGS[number])
    assert len(load_images(config(tmp_path)).held_out) == 1


def test_images_in_two_given_splits_are_reported(tmp_path, capsys):
    """By their bytes, and objects by their column."""
    write_table(tmp_path / "a/train.parquet", PNGS, [0] * 10)
    write_table(tmp_path / "a/test.parquet", PNGS[7:], [0] * 3)
    load_images(config(tmp_path / "a"))
    assert "warning: 3 of 3 images of 'test' are also in 'train'" in capsys.readouterr().err
    write_objects_table(tmp_path / "b/train.parquet", range(10))
    write_objects_table(tmp_path / "b/test.parquet", range(10, 20))
    load_images(config(tmp_path / "b", group="thing"))
    assert "warning: 1 of 4 objects of 'test' are also in 'train'" in capsys.readouterr().err


def test_a_column_named_by_group_wins_over_an_expression(tmp_path, capsys):
    settings = write_named(tmp_path / "a", "sheet", range(90))
    splits = load_images(settings)
    assert (splits.facts.unit, splits.facts.by) == ("object", "column") and splits.facts.parts["train"].units < 30
    assert "data.group: the column 'thing' of" in capsys.readouterr().err
    (tmp_path / "a/metadata.csv").unlink()
    assert sorted(set(splits.held_out.objects())) == sorted(
        {f"thing{int(p[:4]) // 3}" for p in splits.held_out.names(range(len(splits.held_out)))}
    )
    with pytest.raises(UserError, match="lack the column 'thing'"):
        load_images(settings, inherited=Inherited(splits.facts))
    by_path = load_images(write_named(tmp_path / "a", "objects", range(90))).facts
    settings = settings.model_copy(update={"group": r"(\d\d\d)\d\.png"})
    (tmp_path / "a/metadata.csv").write_text(
        "file_name," + settings.group + "\n" + "".join(f"{k:04}.png,one\n" for k in range(90))
    )
    assert load_images(settings, inherited=Inherited(by_path)).facts == by_path  # the expression stays one
    with pytest.raises(UserError, match="whole objects are held out, and it has 1"):
        load_images(settings)


def test_bad_keys_are_one_line(tmp_path):
    write_objects_table(tmp_path / "train.parquet", range(20))
    with pytest.raises(UserError, match=r"^data.key: no column 'id'; there are \['image', 'name', 'thing'\]$"):
        load_images(config(tmp_path, key="id"))
    with pytest.raises(UserError, match="^data.key: with data.streaming, whole shards"):
        load_images(config(tmp_path, key="name", streaming=True))


def test_equal_images_of_a_table_are_one_unit(tmp_path):
    """A copy of a training image is not held out."""
    write_table(tmp_path / "a.parquet", PNGS[:5] * 2, [0, 1] * 5)
    splits, found = parts_of(config(tmp_path / "a.parquet", held_out_fraction=0.4))
    assert (len(splits.train), len(splits.held_out), len(found)) == (6, 4, 5)
    assert splits.facts.describe() == "10 images: 6 train, 4 held out"
    write_table(tmp_path / "b.parquet", PNGS[:1] * 5, [0] * 5)
    with pytest.raises(UserError, match="all 5 images are the same"):
        load_images(config(tmp_path / "b.parquet"))


# What is stored


def test_what_is_stored_can_be_read_and_published(tmp_path):
    facts = load_images(write_named(tmp_path / "a", "objects", range(90))).facts
    (tmp_path / "splits.json").write_text(json.dumps(facts.to_dict()))
    assert read_splits(tmp_path / "splits.json") == facts and read_splits(tmp_path / "none.json") is None
    public = SplitFacts.model_validate(publish_splits(facts.to_dict()))
    assert not public.sample and not any(part.digest for part in public.parts.values())
    assert public.thresholds == facts.thresholds and public.describe() == facts.describe()
    assert load_images(config(tmp_path / "a", group=r"(\d\d\d)\d\.png"), inherited=Inherited(public)).note is None
    assert facts.describe() == "9 objects: 4 train, 2 validation, 3 held out"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_from": "0000000000000001"}, "held_out_below and validation_from cross"),
        ({"held_out_below": None}, "held_out_below: must be set exactly if"),
        ({"unit": "object"}, "objects are not named by path"),
        ({"format_version": 2}, "a newer Smalti is needed"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, changes, message):
    facts = load_images(write_named(tmp_path / "a", "folder", range(60))).facts
    (tmp_path / "splits.json").write_text(json.dumps({**facts.to_dict(), **changes}))
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        read_splits(tmp_path / "splits.json")
    assert "\n" not in str(caught.value) and "splits.json" in str(caught.value)


def test_a_division_of_other_units_or_without_images_is_refused(tmp_path):
    settings = write_named(tmp_path / "a", "folder", range(60))
    facts = load_images(settings).facts
    objects = load_images(write_named(tmp_path / "b", "objects", range(60))).facts
    with pytest.raises(UserError, match="^splits.json: divides objects, .* has images, .*belongs to another source"):
        load_images(settings, inherited=Inherited(objects))
    for part, what in (("held_out", "held out"), ("train", "trained on")):
        write_named(tmp_path / "a", "folder", range(60))
        for name in getattr(load_images(settings), part).names(range(facts.parts[part].images)):
            (tmp_path / "a" / name).unlink()
        with pytest.raises(UserError, match=rf"^data: the \d+ images of .* that were {what} are gone; [^\n]*$"):
            load_images(settings, inherited=Inherited(facts))


def test_a_split_of_its_own_stays_held_out(tmp_path, capsys):
    """A folder `test` that is added later is not used, and one that is removed is missed."""
    write_splits(tmp_path / "b", "train", "test")
    own = load_images(config(tmp_path / "b")).facts
    assert own.held_out_split == "test" and own.held_out_below is None
    (tmp_path / "b/test").rename(tmp_path / "b/later")
    with pytest.raises(UserError, match="the split 'test' of training is gone"):
        load_images(config(tmp_path / "b"), inherited=Inherited(own))
    write_splits(tmp_path / "c", "train")
    carved = load_images(config(tmp_path / "c")).facts
    write_splits(tmp_path / "c", "test")
    capsys.readouterr()
    splits = load_images(config(tmp_path / "c"), inherited=Inherited(carved))
    assert "as in training, 10% of 'train' is held out; not used: test" in capsys.readouterr().err
    assert splits.note is None and splits.facts == carved


@pytest.mark.parametrize("changed", [{"held_out_fraction": 0.2}, {"held_out": "val"}, {"group": "(.)"}])
def test_other_settings_of_a_divided_source_are_refused(tmp_path, changed):
    then = config(tmp_path)
    facts = load_images(write_named(tmp_path / "a", "folder", range(60))).facts
    now, name = then.model_copy(update=changed), next(iter(changed))
    with pytest.raises(UserError, match=rf"^data.{name}: .* was divided with data.{name}=.* begin a new run$"):
        inherit_splits(now, then, facts, True)
    assert inherit_splits(now, then, facts, False).refusal  # if it is a copy
    assert inherit_splits(then.model_copy(update={"limit": 3}), then, facts, True).rule == facts
    if "group" in changed:
        assert inherit_splits(now, then, facts, True, regroup=True).rule is None
    assert inherit_splits(now, then, None, True).rule == "position"  # 0.3
    assert inherit_splits(now, None, None, True).note
    clips = [then.model_copy(update={"frames": frames}) for frames in (2, 4)]
    assert inherit_splits(*clips, facts, True, regroup=True).rule == facts  # other windows of the same clips


@needs_digits
def test_digits_are_stratified_and_their_validation_images_come_from_the_training_split():
    every = images_by_split(DataConfig(validation_fraction=0))
    splits = load_images(DataConfig())
    parts = {name: bytes_of_each(part) for name, part in splits.by_name().items()}
    assert {name: len(part) for name, part in parts.items()} == {"train": 3800, "validation": 200, "held_out": 1000}
    assert sorted(parts["train"] + parts["validation"]) == sorted(every["train"])
    assert len(set().union(*parts.values())) == 5000 and parts["held_out"] == every["held_out"]
    assert splits.held_out.labels.bincount().tolist() == [100] * 10 and splits.validation.labels.bincount().min() > 5
    limited = images_by_split(DataConfig(limit=30, augment={"shift": 2}))  # some of the same images
    assert all(len(part) == 30 and set(part) <= set(parts[name]) for name, part in limited.items())


def test_validation_images_do_not_depend_on_the_held_out_ones(tmp_path):
    write_splits(tmp_path, "train", "test")
    found = [
        images_by_split(config(tmp_path, validation_fraction=0.2, **options))["validation"]
        for options in ({}, {"held_out": "test"}, {"limit": 5})
    ]
    (tmp_path / "test").rename(tmp_path / "other")
    found.append(images_by_split(config(tmp_path, validation_fraction=0.2))["validation"])
    assert len(found[0]) == 2 and found[1:] == [found[0]] * 3
    assert load_images(config(tmp_path)).validation is None  # ten images are too few


# Several splits


@pytest.mark.parametrize(
    ("folders", "options", "sizes", "noted"),
    [
        (("train", "test"), {}, (10, 3), []),
        (("train", "test", "val"), {}, (10, 3), ["'test' is held out", "val"]),
        (("train", "dev"), {}, (10, 3), ["'dev' is held out"]),
        (("train", "val", "dev"), {}, (9, 1), ["10% of 'train' is held out", "val, dev"]),
        (("val", "train"), {"split": "val"}, (9, 1), ["10% of 'val' is held out", "train"]),
        (("train", "holdout"), {"held_out": "holdout"}, (10, 3), []),
    ],
)
def test_unusual_choices_and_unused_splits_are_noted(tmp_path, capsys, folders, options, sizes, noted):
    splits = load_images(config(write_splits(tmp_path, *folders), **options))
    assert (len(splits.train), len(splits.held_out)) == sizes
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(noted) and all(each in lines[0] for each in noted)
    assert ("not used: " in "".join(lines)) == (len(noted) == 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"held_out": "vla"}, "data.held_out: no split 'vla'.*'val'"), ({"split": "tarin"}, "data.split: .*'tarin'")],
)
def test_a_missing_split_is_refused_with_the_nearest_name(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        load_images(config(write_splits(tmp_path, "train", "val"), **options))


def test_tables_have_validation_splits(tmp_path, capsys):
    """`datasets` calls them `validation`, whatever their files are called."""
    write_table(tmp_path / "train-00000-of-00001.parquet", PNGS, [0, 1] * 5)
    write_table(tmp_path / "val-00000-of-00001.parquet", PNGS[:4], [1, 1, 0, 0])
    splits = load_images(config(tmp_path))
    assert (len(splits.train), len(splits.held_out)) == (10, 4)
    assert "'validation' is held out\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="no split 'val'; .* has train, validation"):
        load_images(config(tmp_path, held_out="val"))


# No image is trained on and evaluated on


@pytest.mark.parametrize(
    ("split", "held_out"), [(".", None), (".", "test"), ("", None), ("all", None), ("link", "test")]
)
def test_a_split_inside_another_is_not_held_out_of_it(tmp_path, split, held_out):
    write_splits(tmp_path / "all", "test", "train")
    write_splits(tmp_path, "test", "train")
    (tmp_path / "link").symlink_to(tmp_path / "test")
    options = {"split": split, "held_out": held_out or ("all/test" if split == "all" else None)}
    try:
        splits = load_images(config(tmp_path / "all" if split in (".", "") else tmp_path, **options))
    except UserError as error:
        assert str(error).startswith("data.")
    else:
        names = {name: part.names(range(len(part))) for name, part in splits.by_name().items()}
        where = [os.path.realpath(tmp_path / path) for part in names.values() for path in part]
        assert len(where) == len(set(where)) and all(names.values())


DIVISIONS = [
    {},
    {"validation_fraction": 0.0},
    {"validation_fraction": 0.5},
    {"held_out": "test"},
    {"held_out": "test", "held_out_fraction": 0.4, "validation_fraction": 0.3},
    {"held_out": "val"},
    {"held_out": "train", "split": "val"},
    {"split": "more", "held_out": "val", "validation_fraction": 0.5},
    {"limit": 5},
]


@pytest.mark.parametrize("part", ["validation", "held_out"])
def test_evaluation_on_training_images_is_refused(tmp_path, capsys, part):
    """For every pair of settings of runs of 0.3: exactly if the part shares an image with the training split."""
    for seed, (name, count) in enumerate((("train", 30), ("val", 12), ("more", 10))):
        for k in range(count):
            write_image(tmp_path / f"{name}/{k:02}.png", noise(12, 12, seed=100 * seed + k))
    settings = [config(tmp_path, **options) for options in DIVISIONS]
    by_name = [load_images(each, inherited=Inherited("position")).by_name() for each in settings]
    loaded = [{name: bytes_of_each(part) for name, part in parts.items()} for parts in by_name]
    again = [config(f"{tmp_path}/../{tmp_path.name}", **options) for options in DIVISIONS]
    capsys.readouterr()
    refused = 0
    for (then, before), (now, after) in product(zip(settings, loaded, strict=True), zip(again, loaded, strict=True)):
        images = after.get(part, [])
        if seen := len(set(before["train"]).intersection(images)):
            with pytest.raises(UserError, match=rf"^data\..*: {seen} of these {len(images)} "):
                require_unseen(now, then, part)
            refused += 1
        else:
            require_unseen(now, then, part)
    assert 10 < refused < 60 and capsys.readouterr().err == ""
    now = config(tmp_path, split="val", held_out="train", validation_fraction=0.5)
    for unknown in (None, config(tmp_path / "elsewhere")):
        require_unseen(now, unknown, part)


def test_a_stream_and_its_copy_are_divided_differently(tmp_path):
    """A stream by files, a copy by images."""
    write_shards(tmp_path, "parquet", rows_of(40), 4)
    stream, copied = (config(tmp_path, streaming=streaming) for streaming in (True, False))
    for now, then in ((stream, copied), (copied, stream)):
        for part in ("validation", "held_out"):
            with pytest.raises(UserError, match="^data.streaming: "):
                require_unseen(now, then, part)
        require_unseen(now, now, "held_out")
    write_shards(tmp_path, "parquet", rows_of(4), 1, split="test")
    for now, then in ((stream, copied), (copied, stream)):
        require_unseen(now, then, "held_out")


# Objects


def write_objects(folder, objects=range(20), views=6):
    """Write photographs of objects; the names put the views of an object far apart."""
    for view, number in product(range(views), objects):
        write_image(folder / f"view{view}_tile{number:03}.png", noise(12, 12, seed=100 * view + number))


def objects_by_split(splits):
    return {
        name: [re.search(r"tile(\d+)", path)[1] for path in part.names(range(len(part)))]
        for name, part in splits.by_name().items()
    }


@pytest.mark.parametrize("pattern", [r"tile(\d+)", r"tile\d+"])
def test_objects_are_held_out_whole(tmp_path, pattern):
    write_objects(tmp_path / "all")
    options = {"held_out_fraction": 0.2, "validation_fraction": 0.1}
    now, then = (config(tmp_path / "all", group=group, **options) for group in (pattern, None))
    found = objects_by_split(load_images(now))
    assert {name: len(set(part)) for name, part in found.items()} == {"train": 14, "validation": 2, "held_out": 4}
    assert all(part.count(number) == 6 for part in found.values() for number in part)
    assert len(set().union(*found.values())) == 20
    divided = objects_by_split(load_images(then))
    assert set(divided["train"]) & set(divided["held_out"])
    with pytest.raises(UserError, match="^data.group: "):
        require_unseen(then, now, "held_out")


def test_an_object_may_be_a_folder_within_the_source(tmp_path):
    """The path begins at the source, whatever is above it."""
    for number in range(10):
        write_objects(tmp_path / "tile999" / f"tile{number:03}", range(3), 2)
    splits = load_images(config(tmp_path / "tile999", group=r"^tile(\d+)/", held_out_fraction=0.3))
    parts = [{path.split("/")[0] for path in images.names(range(len(images)))} for images in splits.by_name().values()]
    assert sorted(map(len, parts)) == [3, 7] and len(set().union(*parts)) == 10


def test_bad_groups_are_one_line(tmp_path):
    write_objects(tmp_path / "all")
    with pytest.raises(UserError, match="^data.group: invalid regular expression"):
        load_images(config(tmp_path / "all", group="tile("))
    for pattern in (r"part(\d+)", r"tile(x)?"):
        with pytest.raises(UserError, match=r"^data\.group: .* finds no object in view0_tile000.png[^\n]*$"):
            load_images(config(tmp_path / "all", group=pattern))
    write_shards(tmp_path / "table", "parquet", rows_of(40), 4)
    with pytest.raises(UserError, match="^data.group: needs a folder of images"):
        load_images(config(tmp_path / "table", group="tile"))
