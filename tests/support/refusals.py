"""How a damaged folder is refused."""

from __future__ import annotations

import pytest

from pipelines import ImagePipeline
from tokenizer.files import PipelineLoadError


def refused(folder, error, *needles, load=ImagePipeline.from_pretrained, **options):
    with pytest.raises(error) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert isinstance(caught.value, PipelineLoadError) and message.isprintable() and len(message) < 1000
    for needle in needles:
        assert str(needle) in message, (needle, message)
    return message


def tokens_of(pipe):
    return pipe(2, seed=0, progress=False, output_type="pt").tokens
