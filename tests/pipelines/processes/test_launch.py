"""How a command joins the processes that share its work: on which device each works, and that all part at the end."""

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
from pipelines.processes.launch import LAUNCHERS, build_accelerator, join_group, own_device


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_each_of_several_works_where_accelerate_says():
    for rank in range(2):
        given, group = torch.device("meta", rank), ProcessGroup(rank, 2)
        assert own_device("auto", given, group) == own_device("meta", given, group) == given
        for other in ("cpu", "cuda", "meta:0"):
            with pytest.raises(UserError, match=f"'{other}': accelerate chose meta for its processes; leave it auto"):
                own_device(other, given, group)
    assert own_device("auto", torch.device("cpu:0"), ProcessGroup(1, 2)) == torch.device("cpu")


def test_one_process_works_where_it_was_asked_to():
    assert own_device("auto", torch.device("meta:1"), ALONE) == torch.device("meta:1")
    assert own_device("cpu", torch.device("meta:1"), ALONE) == torch.device("cpu")
    with pytest.raises(UserError, match="device: 'nonsense' cannot be used here"):
        own_device("nonsense", torch.device("cpu"), ALONE)


def test_a_process_that_no_launcher_started_is_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)  # importing it would be an error
    with join_group("cpu") as (group, device):
        assert group is ALONE and device == torch.device("cpu")


def test_hosts_wait_for_each_other_as_long_as_their_gpus_do(monkeypatch):
    """torch's own default is half an hour, whatever the run says."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: asked.append(options))
    for device, processes in (("cuda", 1), ("cpu", 2), ("cuda", 2)):
        several: Any = SimpleNamespace(device=torch.device(device), num_processes=processes)
        launch.group_of_hosts(several, 7200)
    assert asked == [{"backend": "gloo", "timeout": timedelta(hours=2)}]


@pytest.mark.parametrize("said", [{"WORLD_SIZE": "1"}, {}])
def test_one_process_that_torchrun_starts_and_an_address_from_elsewhere_are_fine(said, one_process, monkeypatch):
    """Many batch scripts export an address for all that they start."""
    for name, value in {**said, "MASTER_ADDR": "node-1"}.items():
        monkeypatch.setenv(name, value)
    assert build_accelerator().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="only one was started"):
        build_accelerator()


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("refused", [False, True])
def test_processes_that_were_launched_part_at_the_end(monkeypatch, name, refused):
    """Also those of which one refuses, and once."""
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
