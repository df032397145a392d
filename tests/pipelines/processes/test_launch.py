"""Joining the processes that share a command's work: their devices, and leaving the group at the end."""

from __future__ import annotations

import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.config import UserError
from pipelines.processes import launch
from pipelines.processes.group import ALONE, ProcessGroup
from pipelines.processes.launch import LAUNCHERS, TWO_PROCESSES, build_accelerator, join_group, own_device


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_several_processes_use_the_devices_that_accelerate_chose():
    for rank in range(2):
        given, group = torch.device("meta", rank), ProcessGroup(rank, 2)
        assert own_device("auto", given, group) == own_device("meta", given, group) == given
        for other in ("cpu", "cuda", "meta:0"):
            with pytest.raises(UserError, match=f"^device: '{other}'"):
                own_device(other, given, group)
    assert own_device("auto", torch.device("cpu:0"), ProcessGroup(1, 2)) == torch.device("cpu")


def test_a_single_process_uses_the_requested_device():
    assert own_device("auto", torch.device("meta:1"), ALONE) == torch.device("meta:1")
    assert own_device("cpu", torch.device("meta:1"), ALONE) == torch.device("cpu")
    with pytest.raises(UserError, match="^device: 'nonsense'"):
        own_device("nonsense", torch.device("cpu"), ALONE)


def test_a_process_without_a_launcher_is_alone_and_does_not_import_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)  # importing it is an error
    with join_group("cpu") as (group, device):
        assert group is ALONE and device == torch.device("cpu")


def test_the_cpu_group_has_the_timeout_of_the_run(monkeypatch):
    """torch's default is half an hour."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: asked.append(options))
    for device, processes in (("cuda", 1), ("cpu", 2), ("cuda", 2)):
        several: Any = SimpleNamespace(device=torch.device(device), num_processes=processes)
        launch.make_cpu_group(several, 7200)
    assert asked == [{"backend": "gloo", "timeout": timedelta(hours=2)}]


def test_one_process_in_place_of_several_is_refused(one_process, monkeypatch):
    """An address alone is fine, because many batch scripts export one; with a precision, accelerate's launcher has set
    it for several processes."""
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    for variables, accepted in (
        ({}, True),
        ({"WORLD_SIZE": "1"}, True),
        ({"WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            if accepted:
                assert build_accelerator().num_processes == 1
            else:
                with pytest.raises(UserError) as refused:
                    build_accelerator()
                assert TWO_PROCESSES in str(refused.value)


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("refused", [False, True])
def test_launched_processes_leave_their_group_once_also_after_a_refusal(monkeypatch, name, refused):
    ended: list[Any] = []
    facts = {"process_index": 0, "num_processes": 1, "device": torch.device("cpu", 0)}
    monkeypatch.setattr(
        launch, "build_accelerator", lambda: SimpleNamespace(**facts, end_training=lambda: ended.append(1))
    )
    monkeypatch.setenv(name, "0")
    try:
        with join_group("auto") as (group, device):
            assert (group, device) == (ALONE, torch.device("cpu")) and not ended
            if refused:
                raise UserError("no")
    except UserError:
        assert refused
    assert ended == [1]
