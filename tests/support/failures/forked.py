"""Runs of the real verbs in forked children: everything is imported once, so that starting one takes no time.

For a process that has started no threads, which is why `benchmarks/trust/faults.py` is a command of its own.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from launch import VQVAE, blank, exact, free_port, make_tokens, prior_arguments, states, tokenizer_arguments
from safetensors.numpy import load_file

from pipelines import ImagePipeline
from pipelines.metrics.codebook import CodebookUse
from pipelines.train_prior import PriorTask
from pipelines.train_tokenizer import TokenizerTask
from pipelines.training import loop as training
from tokenizer.files import verify_manifest

STAGES = ("train_tokenizer", "train_prior")
ROWS = 75  # of training data: batches of 16 run across the ends of epochs, and 300 steps are 64 epochs
# Images are augmented and codes revived, a critic plays, gradients of two micro-batches are added, dropout draws, a
# line of metrics is half gathered when a state is saved: all that a resume could lose.
RUN = {"train__batch_size": 16, "train__timeout": 20, "train__log_every": 7}
TOKENIZER = {
    **RUN,
    "data__limit": ROWS,
    "data__augment__rotate": 8,
    "train__accumulate": 2,
    "model": {**VQVAE, "quantizer": {"kind": "ema", "codes": 32, "dim": 8, "revive_every": 3, "revive_below": 0.3}},
    "critic": {"weight": 0.5, "start": 4, "warmup": 4, "ramp": 8, "width": 8, "layers": 1},
}
PRIOR = {
    **RUN,
    "train__optimizer": "muon",
    "model": {"kind": "gpt", "dim": 16, "depth": 2, "heads": 2, "dropout": 0.2, "attention_dropout": 0.1},
}

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` tells its processes, of all that a run reads."""

ENDING = {signal.SIGINT, signal.SIGTERM}
Hook = Callable[[int], None]


class Attempt:
    """The processes of one start of a run; `codes` of those that have ended, negative for a signal."""

    def __init__(self, pids: list[int]) -> None:
        self.pids, self.told = pids, False
        self.codes: dict[int, int] = {}
        self.ended: dict[int, float] = {}

    def wait(self, seconds: float = 120.0, among: set[int] | None = None) -> bool:
        """Whether the processes of these ranks (all) end within so many seconds."""
        wanted, until = among or set(range(len(self.pids))), time.monotonic() + seconds
        while not wanted <= set(self.codes):
            for rank, pid in enumerate(self.pids):
                if rank not in self.codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    self.codes[rank], self.ended[rank] = os.waitstatus_to_exitcode(done[1]), time.monotonic()
            if time.monotonic() > until:
                return wanted <= set(self.codes)
            time.sleep(min(0.0005, seconds))
        return True

    def send(self, number: int, ranks: list[int] | None = None) -> None:
        """A signal to these ranks (all) that still run."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if rank not in self.codes:  # not waited for, so the number is still its own
                os.kill(self.pids[rank], number)

    def end(self) -> list[int]:
        """Its exit codes. As a launcher does, it tells those that are left after one has failed to end.

        Raises `AssertionError` for a process that then goes on for half a minute, or for two minutes in any case.
        """
        seconds = 120.0
        while not self.wait(0.05):
            seconds -= 0.05
            if any(self.codes.values()) and not self.told:
                self.send(signal.SIGTERM)
                self.told, seconds = True, 30.0
            if seconds <= 0:
                left = set(range(len(self.pids))) - set(self.codes)
                self.send(signal.SIGKILL)
                raise AssertionError(f"hung: {sorted(left)} of {len(self.pids)} processes; the others {self.codes}")
        return [self.codes[rank] for rank in range(len(self.pids))]


@dataclass
class Case:
    """A stage, how many processes, and the folder for its runs."""

    verb: str
    processes: int
    folder: Path
    more: dict[str, Any]
    tokens: Path | None = None
    sharded: bool = False
    rows: int = ROWS
    hooks: list[Hook] = field(default_factory=list)
    seconds: float = 0.0
    expected: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in a table."""
        count = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return f"{self.verb.removeprefix('train_')}, {count}{', sharded' * self.sharded}"

    def arguments(self, out: Path) -> list[str]:
        """The command line of its verb."""
        more = {**(PRIOR if self.tokens else TOKENIZER), **self.more}
        return prior_arguments(out, self.tokens, **more) if self.tokens else tokenizer_arguments(out, **more)

    def start(self, out: Path, *hooks: Hook) -> Attempt:
        """Start the run `out`, or continue it; each child first calls the hooks with its rank."""
        places = SHARDED if self.sharded else {}
        return start_verb(self.verb, self.processes, out, self.arguments(out), *self.hooks, *hooks, places=places)

    def whole(self) -> Path:
        """The run that nobody interrupts, which the others are compared with."""
        out = self.folder / "whole"
        began = time.monotonic()
        codes = self.start(out, record_samples(out)).end()
        assert set(codes) == {0}, log_of(out).read_text()
        self.seconds, self.expected = time.monotonic() - began, fingerprint(out)
        return out

    def ready(self) -> None:
        """Have something to compare with."""
        if not self.expected:
            self.whole()

    def complete(self, out: Path) -> list[str]:
        """Run it to its end; what is not as it is in the uninterrupted run."""
        codes = self.start(out, record_samples(out)).end()
        if set(codes) != {0}:
            return [f"{out.name}: exit codes {codes}: {last_line(out)}"]
        return self.differences(out)

    def differences(self, out: Path) -> list[str]:
        """The parts of a finished run that differ from the uninterrupted one, and rows that came too often or not."""
        found = fingerprint(out)
        parts = [part for part in sorted(self.expected | found) if found.get(part) != self.expected.get(part)]
        return [f"{out.name}: {part}" for part in parts] + [f"{out.name}: {text}" for text in samples_of_run(self, out)]


def new_case(verb: str, processes: int, folder: Path, sharded: bool = False, **more: Any) -> Case:
    """A case with a folder of its own, and tokens if it needs some. sharded: whether processes share the weights."""
    case = Case(verb, processes, folder / f"{verb}-{processes}{'-sharded' * sharded}", more, sharded=sharded)
    case.folder.mkdir(parents=True)
    if verb == "train_prior":
        case.tokens = case.folder / "tokens"
        in_child(partial(make_tokens, case.tokens, rows=ROWS))
    if (verb, sharded) not in WARM:
        import_what_runs_import(case)
        WARM.add((verb, sharded))
    return case


WARM: set[tuple[str, bool]] = set()


def import_what_runs_import(case: Case) -> None:
    """Import here what processes of a run otherwise import one by one: it is most of the time that a start takes."""
    out, listed = case.folder / "imports", case.folder / "modules.json"

    def hook(rank: int) -> None:
        take_step = training.take_step

        def listing(*arguments: Any) -> None:
            take_step(*arguments)
            if not rank:
                listed.write_text(json.dumps(list(sys.modules)))

        training.take_step = listing

    case.start(out, hook).end()
    import_once(*json.loads(listed.read_text()))
    shutil.rmtree(out)


def import_once(*names: str) -> None:
    """Import here what each child would; fails if that starts a thread, which children would lack."""
    for name in names:
        if name not in sys.modules:
            with suppress(Exception):  # some are made by others, or under another name
                importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread was started, which children would lack"
    gc.freeze()  # children look for garbage among their own alone


def start_verb(
    verb: str, world: int, out: Path, argv: list[str], *hooks: Hook, places: dict[str, str] | None = None
) -> Attempt:
    """Start `smalti VERB` in so many processes; each first calls the hooks with its rank. places: more variables of
    their environment. Charts and sample pictures are blank: drawing is half of a tiny run, and has tests of its own."""

    def act(rank: int) -> None:
        os.environ.update(places or {})
        CodebookUse.picture = blank  # type: ignore[method-assign]
        ImagePipeline.sample_picture = blank  # type: ignore[method-assign]
        for hook in hooks:
            hook(rank)
        importlib.import_module(f"pipelines.{verb}").main(argv)

    return fork(world, act, log_of(out))


def fork(world: int, act: Hook, log: Path) -> Attempt:
    """`act` in each of so many processes, with its rank; several find each other as those of a launcher do."""
    port, pids = free_port(), []
    sys.stdout.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # libraries that look after forks would swallow one
    for rank in range(world):
        pids.append(os.fork())
        if not pids[-1]:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
            where = {**places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            child(partial(act, rank), log, where if world > 1 else {}, before)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Attempt(pids)


def in_child(act: Callable[[], Any]) -> None:
    """Do it in a child, so that what torch does there stays out of this process. Raises `AssertionError`."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, "a child has failed"


def child(act: Callable[[], None], log: Path, places: dict[str, Any], signals: set[signal.Signals]) -> None:
    """Become a process that does this, with these signals blocked; does not return."""
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update({key: str(value) for key, value in places.items()})
        act()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def log_of(out: Path) -> Path:
    """Where the processes of a run print."""
    return out.with_name(f"{out.name}.log")


def last_line(out: Path) -> str:
    """The last that they printed."""
    return (log_of(out).read_text().strip().splitlines() or ["(nothing was printed)"])[-1]


# What a run was trained on


def record_samples(out: Path) -> Hook:
    """Make each process append to `<out>.samples`, after every step, its rank, the step and the rows it used."""

    def hook(rank: int) -> None:
        file = os.open(out.with_name(f"{out.name}.samples"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        made: dict[int, Any] = {}
        take_step = training.take_step

        def remembered(batch: Any) -> Any:
            def call(self: Any, indices: Any, epochs: Any, seed: int) -> Any:
                result = batch(self, indices, epochs, seed)
                made[id(result)] = (result, list(zip(epochs.tolist(), indices.tolist(), strict=True)))
                return result

            return call

        def carried(prepare: Any) -> Any:
            def call(self: Any, batch: Any) -> Any:
                result = prepare(self, batch)
                if id(batch) in made:
                    made[id(result)] = (result, made.pop(id(batch))[1])
                return result

            return call

        def recorded(run: Any, micro_batches: list[Any], lr: float) -> None:
            step, pairs = run.step, [pair for batch in micro_batches for pair in made.pop(id(batch))[1]]
            take_step(run, micro_batches, lr)
            os.write(file, (json.dumps([rank, step, pairs]) + "\n").encode())  # in one piece, whoever kills it

        for task in (TokenizerTask, PriorTask):
            task.batch = remembered(task.batch)  # type: ignore[method-assign]
            task.prepare = carried(task.prepare)  # type: ignore[method-assign]
        training.take_step = recorded  # type: ignore[assignment]

    return hook


def steps_of_run(out: Path) -> dict[tuple[int, int], list[list[tuple[int, int]]]]:
    """The rows used by (step, rank), once for each time that it took that step."""
    found: dict[tuple[int, int], list[list[tuple[int, int]]]] = {}
    for line in out.with_name(f"{out.name}.samples").read_text().splitlines():
        rank, step, pairs = json.loads(line)
        found.setdefault((step, rank), []).append([tuple(pair) for pair in pairs])
    return found


def steps_taken(out: Path) -> int:
    """How far the run was when it last took a step."""
    try:
        lines = out.with_name(f"{out.name}.samples").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])[1] + 1 if lines else 0


def samples_of_run(case: Case, out: Path) -> list[str]:
    """What is wrong with the rows that a finished run was trained on: each (epoch, row) is due once, the last cut."""
    taken, wrong = steps_of_run(out), []
    if any(again != times[0] for times in taken.values() for again in times):
        wrong.append("a step was repeated with other rows")
    counts = Counter(pair for times in taken.values() for pair in times[0])
    whole, rest = divmod(sum(counts.values()), case.rows)
    by_row = Counter(row for epoch, row in counts.elements() if epoch < whole)
    uneven = whole > 0 and (set(by_row.values()) != {whole} or len(by_row) != case.rows)
    if set(counts.values()) != {1} or uneven:
        wrong.append(f"rows did not come once an epoch for {whole} epochs and {rest} more")
    if len(taken) != case.processes * case.more["train__steps"]:
        wrong.append(f"{len(taken)} steps of {case.processes} processes were taken")
    return wrong


# What a run leaves


def fingerprint(out: Path) -> dict[str, str]:
    """sha256 of every part of a finished run that no clock is in: weights, averages, codebook, optimizers, figures."""
    state = states(out)[-1]
    verify_manifest(state)
    counters = json.loads((state / "state.json").read_text())
    counters["counters"].pop("minutes")
    files = [path for path in state.rglob("*") if path.is_file() and path.name not in ("state.json", "manifest.json")]
    files += [*out.glob("tokenizer/*.safetensors"), *out.glob("pipeline/*/*.safetensors"), *out.glob("previews/*")]
    found = {str(path.relative_to(out)): digest(path) for path in files}
    names = [path.name for place in (out, out / "state") for path in place.iterdir()]
    left = sorted(name for name in names if not name.startswith("step-"))
    return found | {"counters": json.dumps(counters), "metrics.jsonl": json.dumps(exact(out)), "files": str(left)}


def digest(path: Path) -> str:
    """sha256 of a file; of one with pieces of tensors, of these alone, as the rest of it comes in any order."""
    data = path.read_bytes()
    if path.name.startswith("shard-"):
        data = b"".join(key.encode() + value.tobytes() for key, value in sorted(load_file(path).items()))
    return hashlib.sha256(data).hexdigest()


def verifying(out: Path) -> int:
    """How many resume states are whole."""
    count = 0
    for state in states(out):
        try:
            verify_manifest(state)
            count += 1
        except ValueError:
            pass
    return count


def draws(*what: Any) -> random.Random:
    """Random numbers that are the same each time."""
    return random.Random(" ".join(map(str, what)))
