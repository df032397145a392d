"""`smalti export`: the files of a tokenizer or of a pipeline's tokenizer, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import fails
from givens.images import write_pictures
from small import make_tokenizer
from small_pipelines import make_pipeline

from pipelines.commands import export
from pipelines.exports import ExportError


def test_the_tokenizer_of_a_pipeline_is_checked_on_given_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pipe = make_pipeline(size=(8, 8))
    pipe.save_pretrained(tmp_path / "pipeline")
    write_pictures(tmp_path / "images", 3)
    given = [f"tokenizer={tmp_path}/pipeline", f"out={tmp_path}/out", "format=torch", f"images={tmp_path}/images"]
    assert export.main(given) == tmp_path / "out"
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["checked"]["images"] == 8 + 3 and facts["fingerprint"] == pipe.tokenizer.fingerprint()
    assert capsys.readouterr().out.startswith(f"{tmp_path}/out: encoder.pt2 and decoder.pt2; on 11 images ")
    encode = torch.export.load(tmp_path / "out" / "encoder.pt2").module()
    images = torch.rand(2, *pipe.tokenizer.image_shape) * 2 - 1
    assert torch.equal(encode(images), pipe.tokenizer.encode(images))


@pytest.mark.parametrize("images", ["nowhere", "bad/a.png"])
def test_images_that_cannot_be_read_are_an_error(images, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    make_tokenizer("pixels", (8, 8), 1).save_pretrained("tokenizer")
    Path("bad").mkdir()
    Path("bad/a.png").write_text("no image")
    line = fails(capsys, "export", "tokenizer=tokenizer", "out=out", "format=torch", f"images={images}")
    assert line.startswith("error: images: ") and images in line and not Path("out").exists()


def test_a_failed_check_is_an_error(tmp_path, monkeypatch, capsys) -> None:
    def refuse(*_, **__):
        raise ExportError("other ids")

    monkeypatch.setattr(export, "export_tokenizer", refuse)
    make_tokenizer("pixels", (8, 8), 1).save_pretrained(tmp_path / "tokenizer")
    line = fails(capsys, "export", f"tokenizer={tmp_path}/tokenizer", f"out={tmp_path}/out")
    assert line.startswith("error: format: onnx: other ids")
