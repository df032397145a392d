"""Best of N: the best of an image's own candidates by log p(x | condition) - log p(x).

Covers: pipelines/best_of.py, and `best_of` in `ImagePipeline` and `smalti generate`.
"""

from __future__ import annotations

import pytest
import torch
from command import fails
from folders import written
from PIL import Image
from small import generators
from small_pipelines import GIVEN, every_prior_pair, make_conditioned, make_pipeline, pixels_for

from pipelines import ImagePipeline
from pipelines.config import UserError
from pipelines.generate import GenerateConfig, run

LABELS = [2, 0, None, "dog"]
GUIDED = {"guidance_scale": 2.0}


def candidates_of(pipe, seed, count, label=None, **options):
    """Draw candidates by calling the pipeline with one generator again and again, `(count, *grid.shape)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([pipe(1, label, generator=[generator], **options).tokens for _ in range(count)])


@every_prior_pair
def test_the_best_of_each_images_own_candidates(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior)
    found = pipe(4, LABELS, best_of=3, seed=5, output_type="pt", **GUIDED)
    assert found.class_names == ["eel", "cat", "", "dog"] and len(found.images) == 4
    chosen = []
    for k, label in enumerate(LABELS):
        drawn = candidates_of(pipe, 5 + k, 3, label, **(GUIDED if label is not None else {}))
        given = torch.full((3,), pipe.prior.num_classes if label is None else pipe.label_ids(label, 1)[0])
        scores = pipe.prior.log_prob(drawn, given) - pipe.prior.log_prob(drawn)
        chosen.append(0 if label is None else int(scores.argmax()))
        assert torch.equal(found.tokens[k], drawn[chosen[k]])
    assert torch.equal(found.tokens[2], pipe(1, seed=7).tokens[0]), "without a class the first one is as good as any"
    torch.testing.assert_close(found.images, pipe.decode(found.tokens, output_type="pt"))


def test_not_only_the_first_and_one_candidate_is_the_usual_image():
    pipe = make_pipeline()
    labels = [0, 1, 2] * 8
    one, four, plain = (pipe(24, labels, seed=3, **more).tokens for more in ({"best_of": 1}, {"best_of": 4}, {}))
    assert torch.equal(one, plain)
    same = (one == four).flatten(1).all(1)
    assert 0 < int(same.sum()) < 24, "the usual image is the best one of some"
    with torch.no_grad():
        of_one, of_four = (
            pipe.prior.log_prob(each, torch.tensor(labels)) - pipe.prior.log_prob(each) for each in (one, four)
        )
    assert bool((of_four >= of_one).all()) and bool((of_four > of_one).any())


@pytest.mark.parametrize("prior", ["gpt", "masked", "next_scale"])
def test_an_image_does_not_depend_on_its_batch(prior):
    pipe = make_pipeline(prior=prior)
    whole = pipe(4, LABELS, best_of=3, seed=7, **GUIDED).tokens
    for size in (1, 2, 5):
        assert torch.equal(pipe(4, LABELS, best_of=3, seed=7, batch_size=size, **GUIDED).tokens, whole)
    alone = pipe(1, LABELS[3], best_of=3, seed=10, **GUIDED).tokens
    assert torch.equal(alone[0], whole[3])
    listed = pipe(4, LABELS, best_of=3, generator=generators(4, 7), **GUIDED).tokens
    assert torch.equal(listed, whole)
    shared = [
        pipe(4, LABELS, best_of=3, generator=torch.Generator().manual_seed(1), batch_size=size).tokens
        for size in (64, 5)
    ]
    assert torch.equal(*shared)


@pytest.mark.parametrize("removed", [None, ["age"], ["label"], ["label", "age", "motion"]])
def test_the_second_density_lacks_what_guidance_removes(removed):
    torch.manual_seed(3)
    pipe = make_conditioned(outline=False)
    more = {"condition": GIVEN, "guidance_on": removed}
    found = pipe(3, [0, 1, 2], best_of=6, seed=2, **more).tokens
    without = {} if removed is None else {name: GIVEN[name] for name in GIVEN if name not in removed}
    gone = removed is None or "label" in removed
    for k in range(3):
        drawn = candidates_of(pipe, 2 + k, 6, k, **more)
        ids, null = torch.full((6,), k), torch.full((6,), 3)
        with torch.no_grad():
            having = pipe.prior.log_prob(drawn, ids, condition=pipe.read_condition(GIVEN, 6))
            lacking = pipe.prior.log_prob(drawn, null if gone else ids, condition=pipe.read_condition(without, 6))
        assert torch.equal(found[k], drawn[int((having - lacking).argmax())])


def test_a_condition_alone_is_enough():
    torch.manual_seed(4)
    pipe = make_conditioned(outline=False)
    found = pipe(4, condition={"age": [20, 40, 60, 80]}, best_of=4, seed=0).tokens
    assert not torch.equal(found, pipe(4, condition={"age": [20, 40, 60, 80]}, seed=0).tokens)


@pytest.mark.parametrize("way", [{"order": "snake"}, {"order": "per image"}, {"num_orders": 2}, {"parallel": True}])
def test_candidates_are_ranked_in_the_order_they_are_drawn_in(way):
    pipe = make_pipeline(any_order=True)
    orders = torch.stack([torch.randperm(len(pipe.prior.grid)) for _ in range(3)])
    each = [{"order": orders[k]} if way == {"order": "per image"} else way for k in range(3)]
    together = {"order": orders} if way == {"order": "per image"} else way
    found = pipe(3, [0, 1, 2], best_of=5, seed=4, batch_size=4, **together).tokens
    for k in range(3):
        drawn, ids = candidates_of(pipe, 4 + k, 5, k, **each[k]), torch.full((5,), k)
        density = {name: value for name, value in each[k].items() if name != "parallel"}
        with torch.no_grad():
            scores = pipe.prior.log_prob(drawn, ids, **density) - pipe.prior.log_prob(drawn, **density)
        assert torch.equal(found[k], drawn[int(scores.argmax())])


def test_completions_may_be_the_best_of_several():
    pipe, known = make_pipeline(), torch.zeros(8, 12, dtype=torch.bool)
    known[:4] = True
    pixels = pixels_for(pipe, 2)
    found = pipe.complete(pixels, known, [0, 1], draws=2, best_of=3, seed=9, output_type="pt")
    kept = pipe.tokenizer.known_tokens(known[None])[0]
    usual = pipe.complete(pixels, known, [0, 1], draws=2, seed=9, output_type="pt")
    assert found.tokens.shape == usual.tokens.shape and found.images.shape == usual.images.shape
    assert torch.equal(found.tokens[..., kept], usual.tokens[..., kept])
    assert not torch.equal(found.tokens, usual.tokens)
    again = pipe.complete(pixels, known, [0, 1], draws=2, best_of=3, seed=9, batch_size=5, output_type="pt")
    assert torch.equal(again.tokens, found.tokens)


def test_a_callback_sees_all_candidates():
    pipe, seen = make_pipeline(), []
    found = pipe(2, 1, best_of=3, seed=0, batch_size=4, callback_on_step_end=lambda *args: seen.append(args[3])).tokens
    assert {each["tokens"].shape for each in seen} == {(6, *pipe.prior.grid.shape)} and bool(seen[-1]["known"].all())
    last = seen[-1]["tokens"].unflatten(0, (2, 3))
    assert all(bool((found[k] == last[k]).flatten(1).all(1).any()) for k in range(2))


# The command line


def test_generate_writes_the_images_of_the_pipeline(tmp_path):
    torch.manual_seed(0)
    make_pipeline("pixels", size=(8, 8)).save_pretrained(tmp_path / "pipe")
    pipe = ImagePipeline.from_pretrained(tmp_path / "pipe")
    labels = ["eel", None, "dog", "cat", None, "dog", "cat"]
    settings = {"pipeline": str(tmp_path / "pipe"), "num_images": 7, "seed": 3, "condition": {"label": labels}}
    for name, more in {"three": {"best_of": 3, "batch_size": 1}, "again": {"best_of": 3}, "one": {}}.items():
        run(GenerateConfig(out=str(tmp_path / name), **settings, **more))
    assert written(tmp_path / "three") == written(tmp_path / "again") != written(tmp_path / "one")
    expected = pipe(7, labels, best_of=3, seed=3).images
    for k, image in enumerate(expected):
        assert Image.open(tmp_path / "three" / f"{k:05d}.png").tobytes() == image.tobytes()
    assert '"best_of": 3' in (tmp_path / "three" / "job.json").read_text()
    assert "best_of" not in (tmp_path / "one" / "job.json").read_text()
    with pytest.raises(UserError, match="best_of"):
        run(GenerateConfig(out=str(tmp_path / "three"), **settings, best_of=4))


# Refused


@pytest.mark.parametrize("best_of", [0, -1, True, 2.5, "2", None])
def test_the_number_is_a_positive_whole_number(best_of):
    with pytest.raises(ValueError, match=r"\Abest_of must be [^\n]*\Z"):
        make_pipeline()(2, 1, best_of=best_of)


@pytest.mark.parametrize("best_of", ["0", "true", "2.5", "many"])
def test_a_wrong_number_on_the_command_line_is_one_line(best_of, tmp_path, capsys):
    assert "best_of" in fails(capsys, "generate", "pipeline=digits", f"best_of={best_of}", f"out={tmp_path}/grid.png")
    assert list(tmp_path.iterdir()) == []


def test_there_must_be_something_to_rank_by(tmp_path, capsys):
    pipe, plain = make_pipeline(), make_pipeline(labels=[])
    for one, labels in ((pipe, None), (pipe, [None, None]), (plain, None)):
        with pytest.raises(ValueError, match=r"\Abest_of above 1 needs labels or a condition\Z"):
            one(2, labels, best_of=2)
    with pytest.raises(ValueError, match=r"\Abest_of above 1 needs a value of age\Z"):
        make_conditioned(outline=False)(2, 1, best_of=2, guidance_on=["age"])
    with pytest.raises(ValueError, match=r"\Abest_of ranks by log p, which this 'masked' prior only estimates[^\n]*\Z"):
        make_pipeline(prior="masked", exact=False)(2, 1, best_of=2)
    plain.save_pretrained(tmp_path / "pipe")
    argv = (f"pipeline={tmp_path}/pipe", "best_of=2", f"out={tmp_path}/grid.png")
    assert "best_of above 1 needs labels or a condition" in fails(capsys, "generate", *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
