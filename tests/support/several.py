"""Several processes of one step, each in a thread of this process: they share pieces, and wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from pipelines.config.arguments import ToldElsewhere, UserError


class Side:
    """One of them, as far as a step asks an `Accelerator`."""

    device = torch.device("cpu")

    def __init__(self, several: Several, index: int) -> None:
        self.process_index, self.num_processes = index, several.count
        self.is_main_process = index == 0
        self.wait_for_everyone = several.barrier.wait

    def end_training(self) -> None:
        """Nothing to end."""


class Several:
    """`count` sides; put `join` and `on_main` in the place of those of a step, then `run` it."""

    def __init__(self, count: int, seconds: float = 60) -> None:
        self.count, self.barrier = count, threading.Barrier(count, timeout=seconds)
        self.local, self.told = threading.local(), []

    def join(self) -> Side:
        """The side whose thread this is."""
        return self.local.side

    def on_main(self, side: Side, act: Callable[[], Any]) -> Any:
        """What the main side found, told to all, or its mistake."""
        if side.is_main_process:
            try:
                self.told[:] = [act(), None]
            except UserError as error:
                self.told[:] = [None, error]
        self.barrier.wait()
        found, error = self.told
        self.barrier.wait()
        if error is not None:
            raise error if side.is_main_process else ToldElsewhere(str(error))
        return found

    def run(self, act: Callable[[], Any]) -> None:
        """`act` on each side; raises the first error."""
        errors: list[BaseException] = []

        def work(index: int) -> None:
            self.local.side = Side(self, index)
            try:
                act()
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        real = [error for error in errors if not isinstance(error, (threading.BrokenBarrierError, ToldElsewhere))]
        for error in [*real, *errors][:1]:
            raise error
