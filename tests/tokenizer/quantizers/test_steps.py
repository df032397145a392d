"""Steps are counted without asking the device, but for those that matter, none of which is missed."""

import random

import pytest
import torch

from tokenizer.quantizers.steps import Stepped, moved_if


class Every(Stepped):
    """Each `every`-th step matters, and the first."""

    def __init__(self, every):
        super().__init__()
        self.every, self.asked = every, 0

    def matters(self, step):
        return super().matters(step) or (step + 1) % self.every == 0

    def find_step(self):
        self.asked += self.matters(self.step)
        super().find_step()


@pytest.mark.parametrize("sick", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("every", [1, 3, 10])
def test_no_step_that_matters_is_missed(every, sick):
    draw, counter, taken = random.Random(every), Every(every), 0
    for _ in range(300):
        counter.find_step()
        assert counter.step >= taken and int(counter.started) == taken
        assert not (counter.matters(taken) or counter.matters(counter.step)) or counter.step == taken
        well = draw.random() >= sick
        counter.count_step(counter.find_taken(torch.tensor(well)))
        taken += well
    assert taken == 300 if not sick else 100 < taken < 300
    assert counter.asked <= 1 + (300 / every if not sick else 300)


def test_of_a_loaded_counter_the_step_is_found_out():
    one, other = Every(10), Every(10)
    for _ in range(25):
        one.find_step()
        one.count_step(torch.tensor(True))
    other.load_state_dict(one.state_dict())
    one.load_state_dict(Every(10).state_dict())
    for counter, step in ((one, 0), (other, 25)):
        counter.find_step()
        assert counter.step == step


def test_what_was_not_taken_stays_whatever_it_would_have_become():
    before, sick = torch.randn(3), torch.full((3,), torch.nan)
    for no, yes in ((False, True), (torch.tensor(False), torch.tensor(True))):
        assert torch.equal(moved_if(no, sick, before), before)
        assert torch.equal(moved_if(yes, before + 1, before), before + 1)


def test_only_where_it_matters_somebody_waits_to_hear_of_a_step():
    counter = Every(5)
    for step, waits in ((0, True), (1, False), (3, False), (4, True), (5, False)):
        counter.step = step
        for well in (torch.tensor(True), torch.tensor(False)):
            found = counter.find_taken(well)
            assert found is (bool(well) if waits else well), step


def test_steps_are_counted_past_what_float32_counts():
    counter = Every(10)
    counter.started.fill_(1 << 24)
    counter.count_step(torch.tensor(True))
    counter.count_step(False)
    counter.count_step(True)
    assert counter.started.dtype == torch.int64 and int(counter.started) == (1 << 24) + 2 and counter.step == 2
