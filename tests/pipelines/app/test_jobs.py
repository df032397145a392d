"""One job at a time, which can be stopped by who asked for it, and whose errors are sentences."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from optional import Late, needs_gradio

from pipelines.anomaly.calibration import CalibrationError
from pipelines.config import UserError
from tokenizer.files import PathError

gr, page = Late("gradio"), Late("pipelines.app.jobs")
pytestmark = needs_gradio


def visitor(name="me"):
    return SimpleNamespace(session_hash=name)


def quiet(*progress, **more):
    return None


def ours(message):
    """A mistake of a request, as our code raises it."""
    from pipelines.image_pipeline import count_images

    count_images(message, None)


@pytest.mark.parametrize(
    ("fails", "sentence"),
    [
        (lambda: ours(0), "num_images must be at least 1 (got 0)"),
        (lambda: (_ for _ in ()).throw(UserError("a: b\nc: d")), "a: b c: d"),
        (lambda: torch.zeros(2, 3) @ torch.zeros(2, 3), None),
        (lambda: torch.zeros(3).reshape(2), None),
        (lambda: {}["/secret"], None),
        (lambda: int("/secret"), None),
        (lambda: Path("/secret/file").read_text(), None),
        (lambda: None + 1, None),
    ],
)
def test_errors_become_sentences(fails, sentence, capsys):
    """Ours are shown, others only in the log, and one sentence for all of them."""
    handle = page.Jobs().handler(lambda job: fails())
    with pytest.raises(gr.Error) as caught:
        handle(visitor(), quiet)
    assert caught.value.message == (sentence or page.BROKEN) and not caught.value.print_exception
    assert ("Traceback" in capsys.readouterr().err) == (sentence is None)


@pytest.mark.parametrize("kind", [CalibrationError, PathError])
def test_our_own_kinds_of_errors_are_shown_wherever_they_come_from(kind):
    def work(job):
        raise kind("say so")

    with pytest.raises(gr.Error) as caught:
        page.Jobs().handler(work)(visitor(), quiet)
    assert caught.value.message == "say so"


def test_no_markup_of_a_message_is_obeyed():
    message = page.told("no class is called <img src=x onerror=alert(1)>\n\x1b[31m" + "y" * 5000).message
    assert "<" not in message and "&lt;img" in message and "\x1b" not in message and len(message) < 1200


def test_a_job_reports_its_steps_and_gives_its_result():
    seen = []
    jobs = page.Jobs()

    def work(job, first, second):
        assert jobs.current is job
        job.step(1, 3, "images")
        known = torch.tensor([[True, True, False]])
        job.watch(None, 0, 2, {"tokens": known, "known": known})
        return first + second

    assert jobs.handler(work)(visitor(), lambda at, unit: seen.append((at, unit)), 2, 3) == 5
    assert seen == [((0, 1), "steps"), ((1, 3), "images"), ((2, 3), "tokens")] and jobs.current is None


def test_steps_are_shown_a_few_times_a_second():
    """However many there are: every report makes the browser look at the whole page."""
    seen = []
    job = page.Job("me", lambda at, unit: seen.append(at))
    began = time.monotonic()
    while time.monotonic() - began < 1:
        job.step(len(seen), 9, "tokens")
    assert 2 <= len(seen) <= 4


def test_only_who_asked_for_a_job_stops_it(monkeypatch):
    told = []
    monkeypatch.setattr("gradio.Info", lambda text, **more: told.append(text))
    jobs = page.Jobs()

    def work(job):
        jobs.stop(visitor("another"))
        job.step(1, 9, "tokens")
        jobs.stop(visitor("me"))
        job.step(2, 9, "tokens")
        raise AssertionError("it goes on")

    jobs.stop(visitor("me"))  # nothing to stop, and nothing that a later job would feel
    assert jobs.handler(work)(visitor("me"), quiet) == gr.skip()
    assert told == ["stopped after 2 of 9 tokens"] and jobs.current is None


def test_jobs_wait_for_each_other():
    jobs, at_once, most = page.Jobs(), [], []

    def work(job):
        at_once.append(job)
        most.append(len(at_once))
        time.sleep(0.02)
        at_once.remove(job)

    handle = jobs.handler(work)
    threads = [threading.Thread(target=handle, args=(visitor(str(k)), quiet)) for k in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5


def test_a_job_after_one_that_failed():
    jobs = page.Jobs()
    with pytest.raises(gr.Error):
        jobs.handler(lambda job: ours(0))(visitor(), quiet)
    assert jobs.handler(lambda job: "done")(visitor(), quiet) == "done"


def test_a_stopped_job_says_how_far_it_came():
    job = page.Job("me", quiet)
    job.stop.set()
    with pytest.raises(page.Stopped, match="stopped after 1,200 of 2,000 tokens"):
        job.step(1200, 2000, "tokens")
