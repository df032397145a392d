"""`smalti probe`: probes separate classes, never see what they are measured on; and refusals."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from command import fails
from PIL import Image

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.commands.probe import fit_probe, randomize_prior


def probes_in(out):
    return {row["features"]: row for row in json.loads((out / "probe.json").read_text())["probes"]}


def test_probe_tells_separable_classes_apart(two_classes, tmp_path, capsys):
    pytest.importorskip("sklearn")
    main(["probe", f"pipeline={two_classes}/run/pipeline", f"out={tmp_path}/out"])
    printed, rows = capsys.readouterr().out, probes_in(tmp_path / "out")
    assert list(rows) == ["pixels", "codes", "prior.0", "prior.1"]
    assert rows["pixels"]["accuracy"] == 1
    assert max(rows[f"prior.{layer}"]["accuracy"] for layer in (0, 1)) > 0.7
    assert [row["random_accuracy"] is None for row in rows.values()] == [True] * 2 + [False] * 2
    assert all(name in printed for name in rows)
    with Image.open(tmp_path / "out" / "probe.png") as picture:
        assert picture.height > 4 * 20
    main(["probe", f"pipeline={two_classes}/run/pipeline", f"out={tmp_path}/again"])
    assert probes_in(tmp_path / "again") == rows, "a function of the seed"


def test_a_probe_does_not_choose_by_what_it_is_measured_on():
    """It is accurate on new points of separable classes, and near chance after training on random labels."""
    pytest.importorskip("sklearn")
    points, new = torch.randn(400, 6) * torch.logspace(-3, 3, 6), torch.randn(200, 6) * torch.logspace(-3, 3, 6)
    labels, truth = (points[:, 0] > 0).long(), (new[:, 0] > 0).long()
    right = fit_probe(points, new, labels, truth)
    assert right > 0.95, "features are standardised"
    assert fit_probe(points, new, labels, 1 - truth) == pytest.approx(1 - right)
    assert abs(fit_probe(points, new, torch.randint(2, (400,)), truth) - 0.5) < 0.2


def test_random_weights_are_the_control(two_classes):
    """The control is another prior of the same kind; the pipeline's own is not touched."""
    pipe = ImagePipeline.from_pretrained(two_classes / "run" / "pipeline")
    before = {name: value.clone() for name, value in pipe.prior.state_dict().items()}
    other = randomize_prior(pipe, 0)
    assert all(torch.equal(before[name], value) for name, value in pipe.prior.state_dict().items())
    assert not torch.equal(other.prior.layers[0].qkv.weight, pipe.prior.layers[0].qkv.weight)
    assert other.prior.config == pipe.prior.config and other.tokenizer is pipe.tokenizer


def test_what_probe_refuses(two_classes, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    given = ["probe", f"pipeline={two_classes}/run/pipeline", f"out={tmp_path}/out"]
    assert "data.label_column: " in fails(capsys, *given, "data.label_column=null") and not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert "smalti[probe]" in fails(capsys, *given)
