"""`smalti export`: the files of a tokenizer or of a pipeline's tokenizer, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from givens.images import write_pictures
from small_pipelines import make_pipeline

from pipelines.commands import export


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
