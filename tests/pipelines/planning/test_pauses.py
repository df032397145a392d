"""What a run does beside its steps, against a clock that is simulated; and the presets for GPUs keep it small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from givens.plans import TINY, planned

from pipelines.planning.pauses import MOST, Every, Looks, Pauses, pauses_of

CONFIGS = Path(__file__).parents[3] / "configs"
GRID = ["grid=[16,16]", "vocab_size=16384", "classes=1000", "rows=1281167"]
SCALES = [f"tokenizer={CONFIGS / 'tokenizer' / 'multiscale_imagenet256.yaml'}", "classes=1000", "rows=1281167"]


def simulated(pauses: Pauses, every: Every, step: float, steps: int) -> float:
    """The share of the time of `steps` steps in which none is taken, by a clock."""
    clock = busy = 0.0
    written = 0.0  # when the last state is there
    for number in range(1, steps + 1):
        clock, busy = clock + step, busy + step
        for due, seconds in ((every.evaluate, pauses.evaluate), (every.preview, pauses.preview)):
            clock += seconds if number % due == 0 else 0.0
        if number % every.save == 0:
            clock = max(clock, written) + pauses.save
            written = clock + pauses.written
    return 1 - busy / clock


@pytest.mark.parametrize("written", [0.1, 30.0])
def test_share_is_that_of_a_clock(written):
    pauses = Pauses(evaluate=0.5, preview=2.0, save=1.0, written=written)
    every, step = Every(evaluate=100, preview=200, save=50), 0.03
    assert pauses.share(every, step) == pytest.approx(simulated(pauses, every, step, 20_000), rel=0.05, abs=0.002)


def test_so_many_steps_are_enough_and_a_few_less_are_not():
    pauses = Pauses(evaluate=0.5, preview=2.0, save=1.0, written=2.0)
    enough = pauses.steps_between(0.02)
    assert pauses.share(Every(enough, enough, enough), 0.02) <= MOST
    fewer = enough - 20
    assert pauses.share(Every(fewer, fewer, fewer), 0.02) > MOST


def test_more_gpus_share_evaluations_and_launches_are_not_shared():
    looks = Looks(evaluated=2000, evaluation_passes=1, previewed=80, passes=256, launches=250)
    one, eight = (pauses_of(looks, 157e9, gpus, 2e14, state=10**9, snapshot=10**8) for gpus in (1, 8))
    assert one.evaluate == pytest.approx(8 * eight.evaluate)
    assert one.preview == eight.preview == pytest.approx(256 * 250 * 7e-6)
    assert one.save == eight.save and one.written == 2.0


def test_plan_says_it_and_warns_of_too_much(capsys):
    seldom = planned(*TINY, "gpus=1", "train.steps=100000", *(f"train.{n}_every=90000" for n in NAMES))
    page = capsys.readouterr().out
    assert re.search(f"all of them +{seldom.beside:.1%}  of the wall clock", page) and "warning" not in page
    often = planned(*TINY, "gpus=1", "train.steps=100000", *(f"train.{n}_every=10" for n in NAMES))
    page = capsys.readouterr().out
    assert seldom.beside < MOST < often.beside and often.hours > seldom.hours
    assert f"evaluations, previews and saves take {often.beside:.1%}" in page


def test_utilization_is_what_is_expected_unless_it_is_given(capsys):
    shares = [
        planned(*TINY, "gpus=1", *more).machine.utilization
        for more in ([], ["train.compile=true"], ["utilization=0.5", "train.compile=true"])
    ]
    assert shares == [0.2, 0.3, 0.5]
    assert "operations are launched; computing takes less" in capsys.readouterr().out


def test_a_prior_without_classes_has_a_plan(capsys):
    assert planned(*[part for part in TINY if "classes" not in part], "classes=0", "gpus=1").beside > 0


NAMES = ("evaluate", "preview", "save")
PRESETS = {
    "prior/gpt_imagenet256": GRID,
    "prior/gpt_any_order_imagenet256": GRID,
    "prior/masked_imagenet256": GRID,
    "prior/next_scale_imagenet256": SCALES,
    "prior/gpt_imagegpt": ["grid=[32,32]", "vocab_size=512", "classes=0", "rows=1281167"],
    "prior/gpt_cifar10": ["grid=[8,8]", "vocab_size=1024", "classes=10", "rows=50000", "gpus=1"],
    "tokenizer/vqgan_imagenet256": ["rows=1281167"],
    "tokenizer/vit_imagenet256": ["rows=1281167"],
    "tokenizer/multiscale_imagenet256": ["rows=1281167"],
    "tokenizer/vqvae_cifar10": ["rows=50000", "gpus=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_for_gpus_compile_and_spend_little_beside_their_steps(preset, capsys):
    forecast = planned("--config", str(CONFIGS / f"{preset}.yaml"), "gpu=h100", *PRESETS[preset])
    assert forecast.schedule.compile and forecast.beside <= MOST
