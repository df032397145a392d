"""An optimizer's state to files and back: everything in it as it was, or a line that says what differs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from pipelines.training.checkpoints.optimizers import pack_optimizer, parameter_of, unpack_optimizer
from tokenizer.files import WeightsError

PATH = Path("state", "optimizer-model.safetensors")


class Odd(Optimizer):
    """Whose state is of all that JSON and tensors hold."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "range": (0.5, [1, 2]), "by": {"a": (torch.tensor(2.0), None)}})
        for group in self.param_groups:
            for parameter in group["params"]:
                moment = torch.randn_like(parameter)
                nested = {"pair": (1, torch.randn(2)), "list": [torch.randn(3), {"deep": torch.randn(1)}], "no": None}
                self.state[parameter] = {"step": torch.tensor(3.0), "moment": moment, "number": 7, "nested": nested}


def same(one: Any, two: Any) -> bool:
    """Of the same types and values all the way down, whatever the order of keys."""
    if type(one) is not type(two):
        return False
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and one.stride() == two.stride() and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)).to(memory_format=torch.channels_last)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """The two weights, and the two biases."""
    return [{"params": [p for p in model.parameters() if (p.ndim > 1) == large]} for large in (True, False)]


def stepped(model: nn.Module, kind: Any = AdamW) -> Optimizer:
    optimizer = kind(groups(model))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def through_json(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, document = pack_optimizer(optimizer)
    return {name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(document))


@pytest.mark.parametrize("kind", [Odd, AdamW])
def test_a_state_comes_back_as_it_was(kind):
    one = Odd(groups(layers())) if kind is Odd else stepped(layers())
    tensors, document = through_json(one)
    names = {key.partition(".")[0] for key in tensors}
    assert names == ({"0", "1", "2", "3", "group"} if kind is Odd else {"0", "1", "2", "3"})
    assert document["kind"] == kind.__name__ and document["groups"] == [2, 2]
    assert document["parameters"] == ["float32 [4, 3, 3, 3]", "float32 [2, 4]", "float32 [4]", "float32 [2]"]
    torch.manual_seed(1)
    two = kind(groups(layers(9)))
    unpack_optimizer(PATH, tensors, document, two)
    assert same(two.state_dict(), one.state_dict())
    for tensor in tensors.values():
        tensor.fill_(0)  # what was loaded is its own
    assert same(two.state_dict(), one.state_dict())


def test_one_that_is_wrapped_is_known_by_what_is_in_it():
    optimizer = stepped(layers())
    wrapped = SimpleNamespace(optimizer=optimizer, state_dict=optimizer.state_dict, param_groups=optimizer.param_groups)
    assert pack_optimizer(wrapped)[1]["kind"] == "AdamW"  # type: ignore[arg-type]


def test_a_tensor_belongs_to_the_parameter_of_its_number():
    model = layers()
    optimizer = stepped(model)
    parameters = [parameter for group in groups(model) for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        assert parameter_of(optimizer, f"{index}.exp_avg") is parameter
    for key in ("4.exp_avg", "group.0.lr", "", ".exp_avg", "-1.exp_avg", "99999999.step"):
        assert parameter_of(optimizer, key) is None


def test_moments_are_of_the_type_they_were_and_laid_out_as_their_weights():
    """Those of bfloat16 weights are float32 here; those in channels last were contiguous in the file."""
    model, other = layers().bfloat16(), layers(9).bfloat16()
    one, two = AdamW(groups(model)), AdamW(groups(other))
    for group in one.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.rand(parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
            one.state[parameter] = {"step": torch.tensor(3.0), **moments}
    unpack_optimizer(PATH, *through_json(one), two)
    for (parameter, entry), held in zip(two.state.items(), one.state.values(), strict=True):
        assert entry["step"].dtype == torch.float32 and entry["step"].shape == ()
        for name in ("exp_avg", "exp_avg_sq"):
            assert entry[name].dtype == torch.float32 and torch.equal(entry[name], held[name])
            assert entry[name].stride() == parameter.stride() and not entry[name].requires_grad


Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]
NOT = "not a state of this optimizer (ValueError: "
REFUSED: dict[str, tuple[Change, str]] = {
    "kind": (lambda tensors, said: said.update(kind="SGD"), "kind is 'SGD', expected 'AdamW'"),
    "no kind": (lambda tensors, said: said.pop("kind"), "kind is None, expected 'AdamW'"),
    "groups": (lambda tensors, said: said.update(groups=[2, 3]), "groups[1] is 3, expected 2"),
    "one group": (lambda tensors, said: said.update(groups=[4]), "groups is [4], expected [2, 2]"),
    "no groups": (lambda tensors, said: said.update(groups=7), "groups is 7, expected [2, 2]"),
    "parameters": (
        lambda tensors, said: said["parameters"].__setitem__(1, "float32 [9]"),
        "parameters[1] is 'float32 [9]', expected 'float32 [2, 4]'",
    ),
    "steps": (
        lambda tensors, said: tensors.update({"0.step": torch.tensor(-1.0)}),
        f"{NOT}0.step is -1.0, expected a count of steps)",
    ),
    "many steps": (
        lambda tensors, said: tensors.update({"3.step": torch.tensor(2.0**53)}),
        f"{NOT}3.step is 9007199254740992.0, expected a count of steps)",
    ),
    "type": (
        lambda tensors, said: tensors.update({"2.exp_avg": torch.zeros(4).double()}),
        f"{NOT}a tensor of type torch.float64, its parameter has torch.float32)",
    ),
    "shape": (
        lambda tensors, said: tensors.update({"2.exp_avg": torch.zeros(2)}),
        f"{NOT}a tensor of shape [2], its parameter has [4])",
    ),
    "decay": (
        lambda tensors, said: said["param_groups"][1].update(weight_decay=7),
        f"{NOT}weight_decay is 7, this run's is 0.01)",
    ),
    "text": (
        lambda tensors, said: said["param_groups"][0].update(lr="x" * 100),
        f"{NOT}lr is '{'x' * 79}, this run's is 0.001)",
    ),
    "tuple": (
        lambda tensors, said: said["param_groups"][0].update(betas=[0.9, 0.999]),
        f"{NOT}betas is [0.9, 0.999], this run's is (0.9, 0.999))",
    ),
    "tensor": (
        lambda tensors, said: said["param_groups"][0].update(lr={"$tensor": "group.0.lr"}),
        "not a state of this optimizer (KeyError: 'group.0.lr')",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_differs_is_told_in_full(name):
    change, said = REFUSED[name]
    tensors, document = through_json(stepped(layers()))
    change(tensors, document)
    with pytest.raises(WeightsError, match=f"^{re.escape(f'{PATH}: {said}')}$"):
        unpack_optimizer(PATH, tensors, document, AdamW(groups(layers())))


def test_what_may_differ_is_taken_or_left():
    """The rate of the step is taken; how this machine computes is left; a count of steps is any from 0 to 2^53."""
    tensors, document = through_json(stepped(layers()))
    document["param_groups"][0] |= {"lr": 5, "foreach": True, "fused": True, "capturable": True, "differentiable": True}
    tensors |= {"0.step": torch.tensor(0.0), "1.step": torch.tensor(2.0**52)}
    optimizer = AdamW(groups(layers()))
    unpack_optimizer(PATH, tensors, document, optimizer)
    one, two = optimizer.param_groups
    assert one["lr"] == 5 and two["lr"] == 0.001 and one["foreach"] is one["fused"] is None
    assert one["capturable"] is one["differentiable"] is False
    assert [float(entry["step"]) for entry in optimizer.state.values()] == [0.0, 2.0**52, 1.0, 1.0]


def test_a_group_too_few_is_refused():
    tensors, document = through_json(stepped(layers()))
    document["param_groups"].pop()
    with pytest.raises(WeightsError, match=r"not a state of this optimizer \(ValueError: .+\)$"):
        unpack_optimizer(PATH, tensors, document, AdamW(groups(layers())))


def test_an_optimizer_without_a_state_has_an_empty_one():
    tensors, document = through_json(SGD(groups(layers()), lr=0.5))
    assert (
        tensors == {} and document["state"] == {} and [group["lr"] for group in document["param_groups"]] == [0.5] * 2
    )
    optimizer = SGD(groups(layers()), lr=0.1)
    unpack_optimizer(PATH, tensors, document, optimizer)
    assert not optimizer.state and optimizer.param_groups[1]["lr"] == 0.5
