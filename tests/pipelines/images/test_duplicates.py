"""Near duplicates of held-out images in training: named where there are many, and only there.

Covers: pipelines/images/duplicates.py.
"""

import re

import numpy as np
import pytest
from givens.images import config, noise, write_image

from pipelines.__main__ import main
from pipelines.images import load_images
from pipelines.images.duplicates import warn_about_duplicates

COUNT = 60
ALIKE, NEAR = 0.05, 0.4
"""Share of an image that differs from another of its object."""
BESIDE, APART = "{object:03}_{view}.png", "{view}_{object:03}.png"
PAIRS = r"^(\d{3})"


def write_views(folder, named=BESIDE, differs=NEAR, views=2):
    """Write views of `COUNT` objects, equal except for noise."""
    for number in range(COUNT):
        base = noise(12, 12, seed=number)
        for view in range(views):
            pixels = (1 - differs) * base + differs * noise(12, 12, seed=[number, view])
            write_image(folder / named.format(object=number, view=view), pixels.astype(np.uint8))
    return folder


def objects_of(images):
    return [re.findall(r"\d{3}", name)[0] for name in images.names(range(len(images)))]


def warned(capsys, source, **options):
    """The splits, and the lines that are printed about near duplicates."""
    splits = load_images(config(source, held_out_fraction=0.2, **options))
    capsys.readouterr()
    warn_about_duplicates(splits)
    return splits, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("named", "differs"), [(BESIDE, NEAR), (BESIDE, ALIKE), (APART, ALIKE)])
def test_near_duplicates_are_counted(tmp_path, capsys, named, differs):
    """Similar images next to each other in the source, and nearly equal ones anywhere. The pair named is one object."""
    splits, (line,) = warned(capsys, write_views(tmp_path, named, differs))
    known, held_out = set(objects_of(splits.train)), objects_of(splits.held_out)
    count, total = map(int, re.findall(r"(\d+) of (\d+) held-out", line)[0])
    assert (count, total) == (sum(name in known for name in held_out), len(held_out))
    left, right = re.search(r"such as (\S+) and ([^;]+);", line).groups()
    assert re.findall(r"\d{3}", left) == re.findall(r"\d{3}", right) and "data.group" in line
    assert left in splits.held_out.names(range(total)) and right in splits.train.names(range(len(splits.train)))


def test_other_images_have_none(tmp_path, capsys):
    """Single images, similar ones in any order, and objects that are held out whole."""
    assert not warned(capsys, write_views(tmp_path / "single", views=1))[1]
    assert not warned(capsys, write_views(tmp_path / "apart", APART, NEAR))[1]
    assert not warned(capsys, write_views(tmp_path / "pairs", differs=ALIKE), group=PAIRS)[1]


def test_it_is_said_once(tmp_path, capsys):
    write_views(tmp_path / "src")
    data = (f"data.source={tmp_path}/src", "data.image_size=12", "model.kind=pixels", "model.levels=4")
    main(["train_tokenizer", *data, "track.trackers=[]", "track.wandb=disabled", f"out={tmp_path}/t"])
    lines = [capsys.readouterr().err]
    main(["encode", f"tokenizer={tmp_path}/t", f"out={tmp_path}/tokens"])
    lines.append(capsys.readouterr().err)
    assert [text.count("near duplicates") for text in lines] == [1, 1]
