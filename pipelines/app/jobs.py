"""Work that a page asks for: one job at a time, whose steps are shown, which can be stopped, and whose errors become
sentences."""

from __future__ import annotations

import html
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from torch import Tensor

from tokenizer.files import one_line

OURS = ("pipelines", "prior", "tokenizer")
BROKEN = "Something went wrong on the server; what it was stands in its log."
BETWEEN = 0.4  # seconds between two reports, each of which makes the browser look at the whole page
MODEL = "model"
"""What all events share that use the pipeline: gradio then runs one of them at a time."""


class Stopped(Exception):
    """The visitor has asked to stop."""


@dataclass
class Job:
    """What is being done for one visitor, and in what units that was last shown."""

    session: str
    report: Callable[..., Any]
    stop: threading.Event = field(default_factory=threading.Event)
    unit: str = ""
    told: float = -math.inf
    """When a step was last shown."""

    def step(self, done: int, total: int, unit: str) -> None:
        """Show that `done` of `total` are made, unless one was shown just now. Raises `Stopped` if asked for."""
        if self.stop.is_set():
            raise Stopped(f"stopped after {done:,} of {total:,} {unit}")
        if unit != self.unit or time.monotonic() - self.told > BETWEEN:
            self.unit, self.told = unit, time.monotonic()
            self.report((done, total), unit=unit)

    def watch(self, pipeline: Any, step: int, rank: int, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a pipeline calls after each step of sampling (`callback_on_step_end`)."""
        known = kwargs["known"]
        self.step(int(known.sum()), known.numel(), "tokens")
        return kwargs


class Jobs:
    """The job that runs, if any does."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.current: Job | None = None

    def handler(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """What gradio calls for `work`, whose first argument is the `Job`, and the others the values on the page."""

        def handle(request: gr.Request, progress: gr.Progress = gr.Progress(), *inputs: Any) -> Any:  # noqa: B008 (gradio's way to ask for one)
            with sentences():
                try:
                    with self.running(Job(str(request.session_hash), progress)) as job:
                        return work(job, *inputs)
                except Stopped as stopped:
                    gr.Info(str(stopped), title="Stopped")
                    return gr.skip()  # what was there stays

        return handle

    @contextmanager
    def running(self, job: Job) -> Iterator[Job]:
        """Make this the current job as soon as there is no other."""
        with self.lock:
            self.current = job
            try:
                job.step(0, 1, "steps")
                yield job
            finally:
                self.current = None

    def stop(self, request: gr.Request) -> None:
        """End this visitor's job at its next step."""
        job = self.current
        if job is not None and job.session == request.session_hash:
            job.stop.set()


@contextmanager
def sentences() -> Iterator[None]:
    """Turn errors into what a visitor is told: a mistake's own line, or, for a bug, that the server's log has it."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        if is_mistake(error):
            raise told(str(error)) from error
        print("error: a request of the page failed", file=sys.stderr)
        traceback.print_exception(error)
        raise told(BROKEN) from error


def told(text: str) -> gr.Error:
    """An error that the page shows. It would obey markup in it, which may come from a file or a visitor."""
    line = one_line(" ".join(text.split()))
    return gr.Error(html.escape(line), print_exception=False)


def is_mistake(error: BaseException) -> bool:
    """Whether the error says what is wrong with a request: one of our own kinds, or a `ValueError` that our code has
    raised; and not a bug, or what a library says."""
    if is_ours(type(error).__module__):
        return True
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return isinstance(error, ValueError) and at is not None and is_ours(str(at.tb_frame.f_globals.get("__name__")))


def is_ours(module: str) -> bool:
    """Whether a module of this name is one of Smalti's."""
    return module.partition(".")[0] in OURS
