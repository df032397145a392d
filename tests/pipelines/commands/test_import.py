"""`smalti import`: skipped weights, refusals, and the verbs that follow."""

from __future__ import annotations

import json

import pytest
import torch
from command import fails
from givens.images import write_pictures
from givens.published import imported, random_images, random_weights, taming_shapes
from safetensors.torch import save_file

from pipelines.__main__ import main


@pytest.fixture
def small(tmp_path):
    """Weights of a small taming model, and a function that writes them to a file."""
    weights = random_weights(taming_shapes(8, (1, 2), attention=(1,)))

    def write(changed):
        path = tmp_path / "model.safetensors"
        save_file(changed, path)
        return path

    return weights, write


def test_weights_that_only_training_needs_are_skipped(small, tmp_path, capsys):
    weights, write = small
    more = {
        "loss.discriminator.main.0.weight": torch.zeros(3),
        "loss.logvar": torch.zeros(()),
        "quantize.embedding.cluster_size": torch.zeros(32),
        "quantize.embedding.embed_avg": torch.zeros(32, 4),
        "model_ema.num_updates": torch.tensor(3),
    }
    tokenizer = imported(write({**weights, **more}), tmp_path / "out", "groups=4", "image_size=16")
    assert "skipped 5 " in capsys.readouterr().out
    assert sum(p.numel() for p in tokenizer.parameters()) == sum(value.numel() for value in weights.values())


CONV = "decoder.up.1.block.0.conv1.weight"


def test_bad_weights_are_named(small, tmp_path, capsys):
    weights, write = small
    missing = {name: value for name, value in weights.items() if name != CONV}
    for wrong, message in (
        (missing, CONV),
        ({**weights, "colorize": torch.zeros(3)}, "'colorize'"),
        ({**weights, CONV: weights[CONV][:, :3].contiguous()}, f"{CONV} has shape [16, 3, 3, 3]"),
    ):
        path = write(wrong)
        error = fails(capsys, "import", f"source={path}", f"out={tmp_path}/out", "groups=4", "image_size=16")
        assert message in error and str(path) in error and not (tmp_path / "out").exists()


def test_places_without_weights_are_refused(small, tmp_path, capsys):
    weights, write = small
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        assert fails(capsys, "import", f"source={tmp_path}/{name}", f"out={tmp_path}/out").startswith("error: source: ")
    bare = {
        "encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(8, 8, 3, 3),
        "encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
        "encoder.conv_out.weight": torch.zeros(4, 8, 3, 3),
        "quantize.embedding.weight": torch.zeros(8, 4),
    }
    line = fails(capsys, "import", f"source={write(bare)}", f"out={tmp_path}/out")
    assert f"{tmp_path}/config.json" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["last.ckpt", "autoencoder.jit"])
def test_pickles_and_torchscript_are_never_opened(tmp_path, capsys, monkeypatch, name):
    torch.save({"state_dict": {}}, tmp_path / name)
    for function in ("torch.load", "torch.jit.load", "pickle.load"):
        monkeypatch.setattr(function, lambda *_, **__: pytest.fail("it was opened"))
    for source in (tmp_path / name, tmp_path):
        line = fails(capsys, "import", f"source={source}", f"out={tmp_path}/out")
        assert line.startswith("error: source: ") and name in line


def test_encoding_asks_for_images_and_knows_their_size(small, tmp_path, capsys):
    weights, write = small
    imported(write(weights), tmp_path / "out", "groups=4", "image_size=[16, 12]")
    given = ["encode", f"tokenizer={tmp_path}/out", f"out={tmp_path}/tokens"]
    assert "data.source: " in fails(capsys, *given)
    write_pictures(tmp_path / "images" / "all", 6, 20, 20, 3)
    main([*given, f"data.source={tmp_path}/images", "data.held_out_fraction=0.5"])
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert facts["imported"]["layout"] == "taming-transformers VQGAN" and len(facts["imported"]["sha256"]) == 64


def test_further_training_starts_from_the_imported_codebook(small, tmp_path):
    """It is neither initialized from the first batch nor revived as dead."""
    weights, write = small
    tokenizer = imported(write(weights), tmp_path / "out", "groups=4", "image_size=16").train()
    before = tokenizer.quantizer.codebook.detach().clone()
    assert torch.equal(before, weights["quantize.embedding.weight"])
    for _ in range(2 * tokenizer.quantizer.config.revive_every):
        tokenizer(random_images(1, tokenizer.image_shape))
    assert torch.equal(tokenizer.quantizer.codebook, before)
