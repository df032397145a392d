"""Pieces of long work: what a job keeps and refuses, how processes share it, and when one is given up.

Covers: pipelines/jobs/pieces.py.
"""

from __future__ import annotations

import time

import pytest
import tqdm
from folders import contents

from pipelines.config import UserError
from pipelines.config.command import ProcessLost
from pipelines.jobs import Job, Piece, sharing
from pipelines.jobs.pieces import cut
from pipelines.jobs.sharing import Share, shared
from pipelines.processes.sharing import ALONE, Team
from tokenizer.files import PathError

PIECES = cut("images", 0, 10, 3)


def job_at(tmp_path, **depends_on):
    return Job(tmp_path / "out", PIECES, {"seed": 0, **depends_on})


def keep_all(job, pieces):
    for piece in pieces:
        job.keep(piece, f"{piece.start} to {piece.stop}".encode())


def test_pieces_cover_all_rows_once():
    assert [(piece.start, piece.stop) for piece in PIECES] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert PIECES[2] == Piece("images", 2, 6, 9) and PIECES[2].name == "images-00002.safetensors"


def test_what_was_kept_is_there_after_a_restart(tmp_path):
    assert job_at(tmp_path).begin() == PIECES
    keep_all(job_at(tmp_path), PIECES[1:3])
    again = job_at(tmp_path)
    missing = again.begin()
    assert missing == [PIECES[0], PIECES[3]] and again.kept() == PIECES[1:3]
    keep_all(again, missing)
    assert [again.read(piece) for piece in PIECES] == [b"0 to 3", b"3 to 6", b"6 to 9", b"9 to 10"]


def test_pieces_of_which_nobody_knows_what_they_depend_on_are_made_again(tmp_path):
    """A process that was killed while it removed the work folder may leave pieces, and no word of what they are."""
    keep_all(job_at(tmp_path), job_at(tmp_path).begin())
    (job_at(tmp_path).work / "job.json").unlink()
    assert job_at(tmp_path, seed=1).begin() == PIECES


def test_a_job_of_which_nothing_was_made_gives_way(tmp_path):
    """A request that the prior refuses must not be in the way of the right one; one with pieces is."""
    job_at(tmp_path).begin()
    job_at(tmp_path, seed=1).begin()
    keep_all(job_at(tmp_path), PIECES[:1])
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"(?s)work with another configuration was begun here.*seed: 1 -> 2"):
        job_at(tmp_path, seed=2).begin()
    assert contents(tmp_path) == before
    assert job_at(tmp_path, seed=1).begin() == PIECES[1:]


@pytest.mark.parametrize("found", ["thesis.tex", "a folder", "a link", "a file"])
def test_a_work_folder_of_somebody_is_refused(tmp_path, found):
    work = job_at(tmp_path).work
    if found == "a link":
        (tmp_path / "elsewhere").mkdir()
        work.symlink_to(tmp_path / "elsewhere")
    elif found == "a file":
        work.write_text("mine")
    else:
        (work / ("sub" if found == "a folder" else "")).mkdir(parents=True)
        (work / ("sub/note" if found == "a folder" else found)).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(PathError, match=work.name):
        job_at(tmp_path).begin()
    assert contents(tmp_path) == before and (not work.is_symlink() or not list((tmp_path / "elsewhere").iterdir()))


def test_a_piece_that_was_changed_is_not_read(tmp_path):
    job = job_at(tmp_path)
    job.begin()
    keep_all(job, PIECES)
    (job.work / PIECES[1].name).write_bytes(b"3 to 7")
    with pytest.raises(UserError, match="was changed"):
        job.read(PIECES[1])
    (job.work / PIECES[2].name).unlink()
    with pytest.raises(UserError, match="the same disk"):
        job.read(PIECES[2])
    assert job.begin() == PIECES[1:3]


# Shared


class Bar(list):
    """What a progress bar shows."""

    def __init__(self, total, initial, disable, **options):
        super().__init__([initial])
        self.total, self.n, self.disable = total, initial, bool(disable)

    def update(self, more):
        self.n += more
        self.append(self.n)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_batches_go_on_from_piece_to_piece_and_the_bar_over_all(tmp_path, monkeypatch):
    """Two processes, of which the second is done; the first makes its six rows, four at a time."""
    bars, batches, kept = [], [], []
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[0])
    job = job_at(tmp_path)
    missing = job.begin()
    first, second = (Share(job, missing, Team(index, 2)) for index in range(2))
    keep_all(job, second.mine)

    def keep(rows):
        kept.extend(rows)
        keep_all(job, [piece for piece in first.mine if set(range(piece.start, piece.stop)) <= set(kept)])

    first.make(4, lambda rows: batches.append(rows) or rows, keep, "making", 5.0)
    assert batches == [[0, 1, 2, 6], [7, 8]] and kept == [0, 1, 2, 6, 7, 8]
    assert bars[0].total == 10 and bars[0] == sorted(bars[0]) and bars[0][0] == 0 and bars[0][-1] == 10


def test_what_is_there_is_not_counted_again(tmp_path, monkeypatch):
    bars, job = [], job_at(tmp_path)
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[0])
    job.begin()
    keep_all(job, PIECES[:2])
    missing = job.begin()
    Share(job, missing).make(4, lambda rows: rows, lambda rows: keep_all(job, missing), "making", 5.0)
    assert bars[0][0] == 6 and bars[0][-1] == 10


def test_only_the_first_process_shows_a_bar(tmp_path, monkeypatch):
    bars, job = [], job_at(tmp_path)
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[-1])
    missing = job.begin()
    keep_all(job, missing)
    for index in range(2):
        Share(job, missing, Team(index, 2)).make(8, lambda rows: rows, lambda rows: None, "making", 5.0)
    assert [bar.disable for bar in bars] == [False, True]


def test_a_process_that_makes_nothing_is_given_up_and_named(tmp_path):
    job = job_at(tmp_path)
    missing = job.begin()
    keep_all(job, [PIECES[0], PIECES[3]])
    began = time.monotonic()
    with pytest.raises(ProcessLost, match=r"process 1 and 2 has made nothing for 0\.3 s"):
        Share(job, missing, Team(0, 3)).wait(0.3)
    assert 0.3 <= time.monotonic() - began < 3


def test_what_keeping_raises_ends_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "PAUSES", (0.01, 0.01))
    job, made = job_at(tmp_path), []

    def keep(rows):
        raise OSError("full")

    missing = job.begin()
    with pytest.raises(OSError, match="full"):
        Share(job, missing).make(1, lambda rows: made.append(rows), keep, "making", 5.0)
    assert len(made) <= 2


def test_a_folder_that_cannot_be_written_or_seen_is_a_mistake(tmp_path):
    class Elsewhere(Team):
        def first(self, act):
            return PIECES  # made where this process does not look

    with pytest.raises(UserError, match="all processes have to see the same disk"):
        shared(job_at(tmp_path), Elsewhere(1, 2))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="out: .*/file/out cannot be written"):
        shared(job_at(tmp_path / "file"), ALONE)


def test_a_share_is_of_what_is_missing(tmp_path):
    share = shared(job_at(tmp_path), ALONE)
    assert share.missing == share.mine == PIECES and share.rows == 10
    keep_all(share.job, PIECES[1:])
    share = shared(job_at(tmp_path), ALONE)
    assert share.mine == PIECES[:1] and share.rows == 3
