"""`smalti export`: the files of a tokenizer or of a pipeline's tokenizer, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from command import fails
from givens.images import write_pictures
from small import make_tokenizer
from small_pipelines import make_pipeline

import pipelines
from pipelines.commands import export
from pipelines.exports import ExportError, export_tokenizer


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


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_the_files_contain_no_path_of_this_machine(tmp_path: Path, format: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    export_tokenizer(make_tokenizer("vit", (8, 8), 1).eval(), tmp_path / "out", format)
    for path in sorted((tmp_path / "out").iterdir()):
        texts = [path.read_bytes()]
        if path.suffix == ".pt2":
            with ZipFile(path) as archive:
                texts += [archive.read(name) for name in archive.namelist()]
        for place in (Path(torch.__file__).parents[1], Path(pipelines.__file__).parents[1], tmp_path):
            assert not any(str(place).encode() in text for text in texts), (path.name, place)


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
