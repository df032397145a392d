"""The training loop of both stages: set up, fit, evaluate, save.

Batches depend only on (seed, step) and random numbers only on (seed, rank, step), so repeating the command resumes a
run bit for bit. `accelerate` manages devices, precision and processes. Finiteness checks and sums of logged scalars
stay on the device, so the host waits for a GPU only to log, evaluate or save.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from prior.compiling import compiler_problem
from prior.cuda_graph import without_graphs
from tokenizer.files import PathError
from tokenizer.precision import in_finest

from ..config import UserError, tell
from ..config.errors import Interrupted
from ..config.schema import difference
from ..files import lock_folder
from ..prefetch import move_batch_async, pin_memory, prefetch
from ..processes.group import ALONE, ProcessGroup
from ..processes.launch import build_accelerator, choose_precision, group_of, leave_group_on_error, make_cpu_group
from .blocks import prepare_blocks
from .checkpoint import (
    Tensors,
    collect_tensors,
    copy_to_cpu,
    is_finite,
    list_checkpoints,
    load_newest,
    read_newest_record,
    remove_leftovers,
    write_checkpoint,
)
from .optimizers import make_optimizer
from .reporting import Pace, announce_start, describe_end, describe_snapshot, show_report, summarize_run, training_bar
from .run_folder import END, check_run_folder, write_config
from .schedule import learning_rate
from .sharding import is_sharding, offloads_to_cpu, require_shardable, shard
from .stopping import Stop, handle_signals
from .task import Split, Task
from .tracking import Tracker, require_installed

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_SKIPPED = 10
SPARE = 1.2  # margin for other programs that write to the disk


def train(build: Callable[[Accelerator], Task], config: Any) -> Path:
    """Train the task that `build` returns, and return the run folder. config: has `out`, `train` and `track`.

    A run folder with the same configuration resumes from its newest checkpoint; `run_folder` lists the settings that
    may change. Signals save and stop the run (see `stopping`). Raises `UserError` if the run folder has another
    configuration, the batch size does not divide evenly, ten steps in a row are not finite, or the final checkpoint
    cannot be saved. Raises `Interrupted`, a KeyboardInterrupt, after Ctrl-C, once the run is saved.
    """
    run, settings = Path(config.out), config.train
    precision = choose_precision(settings.mixed_precision, read_newest_record(run).get("precision"))
    accelerator = build_accelerator(settings.timeout, precision.mixed)
    group = group_of(accelerator)
    with ExitStack() as stack:
        with leave_group_on_error(accelerator):
            require_valid(config, accelerator, group)
            group.main_first(lambda: check_run_folder(run, config))  # before writing anything
            stack.enter_context(lock_folder(run, group))
            changes = group.on_main(lambda: check_run_folder(run, config))
            torch.manual_seed(settings.seed)
            task = build(accelerator)
            if is_sharding(accelerator):
                require_shardable(task)
            accelerator.wait_for_everyone()
            group.on_main(partial(check_run_folder, run, config, task.snapshots))
            trainer = Trainer(task, config, accelerator)
        with handle_signals(trainer.stop, alone=group.world == 1):
            try:
                with leave_group_on_error(accelerator):
                    group.on_main(partial(announce_start, trainer, changes, precision.reason))
                trainer.fit()
            finally:
                trainer.close()
            accelerator.wait_for_everyone()
    unsaved, interrupted = trainer.unsaved, trainer.stop.interrupted is not None
    del trainer, task
    accelerator.free_memory()  # gloo may abort if anything still holds the process group when the interpreter exits
    accelerator.end_training()
    if unsaved:
        raise UserError(f"the run was not saved: {unsaved}")
    if interrupted:
        raise Interrupted
    return run


def require_valid(config: Any, accelerator: Accelerator, group: ProcessGroup) -> None:
    """Raise `UserError` for settings that contradict each other or differ between processes."""
    settings = config.train
    if settings.batch_size % (accelerator.num_processes * settings.accumulate):
        raise UserError(
            f"train.batch_size: {settings.batch_size} is not a multiple of processes x accumulate "
            f"({accelerator.num_processes} x {settings.accumulate})"
        )
    if settings.steps is None and settings.minutes is None:
        raise UserError("train.steps: null needs train.minutes to end the run")
    if settings.compile and accelerator.device.type == "cuda" and (problem := compiler_problem()):
        raise UserError(f"train.compile: {problem}; or set it false")
    require_installed(config.track.trackers)
    mine = {**settings.model_dump(mode="json"), "mixed_precision": accelerator.mixed_precision}
    first, *others = group.gather(lambda: mine)
    for rank, other in enumerate(others, start=1):
        if changes := difference(first, other, "train."):
            raise UserError(f"process {rank} has different settings from process 0: {', '.join(changes)}")


class RunningMeans:
    """Means of logged scalars, summed on the device so that the host need not wait at every step."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}
        """Sums and counts `(2, n)`, keyed by the names of n scalars."""

    def add(self, names: tuple[str, ...], values: Tensor, finite: Tensor) -> None:
        if names not in self.sums:
            self.sums[names] = values.new_zeros(2, len(names))
        self.sums[names] += torch.where(finite, torch.stack([values, torch.ones_like(values)]), 0.0)

    def read(self) -> dict[str, float]:
        totals: dict[str, list[float]] = {}
        for names, tensor in self.sums.items():
            for name, total, number in zip(names, *tensor.tolist(), strict=True):
                before = totals.get(name, [0.0, 0.0])
                totals[name] = [before[0] + total, before[1] + number]
        return {name: total / number for name, (total, number) in totals.items() if number}

    def to_json(self) -> list[Any]:
        return [[list(names), tensor.tolist()] for names, tensor in self.sums.items()]

    @classmethod
    def from_json(cls, saved: list[Any], device: torch.device) -> RunningMeans:
        means = cls()
        for names, sums in saved:
            means.sums[tuple(names)] = in_finest(torch.tensor(sums, dtype=torch.float64).to(device))
        return means


class Trainer:
    """A training run: the task's weights and their average, the optimizers and the progress, from the newest checkpoint
    if there is one.

    Under FSDP, each process holds shards of the weights, the average and the optimizers' moments.
    """

    # Setting up

    def __init__(self, task: Task, config: Any, accelerator: Accelerator) -> None:
        self.task, self.config, self.run = task, config.train, Path(config.out)
        self.accelerator, self.device, self.group = accelerator, accelerator.device, group_of(accelerator)
        self.main, self.sharded = accelerator.is_main_process, is_sharding(accelerator)
        self.hosts = make_cpu_group(accelerator, self.config.timeout)
        self.stop, self.stopping = Stop(self.run), False
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        if not self.sharded:
            task.model.to(self.device)
        self.average = copy.deepcopy(task.model).requires_grad_(False).eval()
        prepare_blocks(task.nets.values(), self.config)
        self.unsharded = shard(task, self.average, accelerator) if self.sharded else self.average
        matrices, decaying = task.matrices(), task.decaying()
        bf16 = self.device.type == "cuda" or accelerator.mixed_precision == "bf16"
        self.optimizers = {
            name: make_optimizer(
                parameters, matrices, decaying, self.config, task.betas.get(name, self.config.betas), bf16
            )
            for name, parameters in task.param_groups.items()
        }
        record = self.load()
        self.group.on_main(partial(remove_leftovers, self.run))  # now that all checks have passed
        self.group.on_main(partial(write_config, self.run, config, task.divided))
        self.step: int = record.get("step", 0)
        self.minutes: float = record.get("minutes", 0.0)
        self.scalars = RunningMeans.from_json(record.get("scalars", []), self.device)
        # The numbers of skipped steps: in total, and in a row.
        self.skips = torch.tensor(record.get("skips", [0, 0]), device=self.device)
        self.keep_total = torch.tensor([1, 0], device=self.device)
        self.last_terms: dict[str, tuple[tuple[str, ...], Tensor]] = {}
        """Names and values of the scalars of each parameter group in the last step."""
        self.evaluation: dict[str, float] = record.get("evaluation", {})
        self.reported: dict[str, float] = record.get("reported", {})  # held-out figures, at the end of the run
        self.best: dict[str, Any] = record.get("best", {})  # step, score and evaluation
        self.finished = False  # whether the final weights are those that `Task.finish` returned
        self.finished_evaluation: dict[str, float] = {}  # of these, on validation images
        self.pending: list[str] = record.get("pending", [])  # due at the saved step, not done yet
        self.precision_before: str | None = record.get("precision")
        self.saved_step, self.unsaved = (self.step if record else -1), ""
        self.since = self.step, time.monotonic()
        if not self.sharded:
            task.nets = {name: accelerator.prepare_model(net.to(self.device)) for name, net in task.nets.items()}
        # metrics.jsonl keeps its lines up to this step. If this step's line is still due, it is dropped and written
        # again, because a killed process may already have written it.
        undone = not {"log", "evaluate"}.isdisjoint(self.pending)
        resume_step = self.step + (-0.5 if undone else 0.5) if record else 0
        self.tracker = Tracker(
            self.run,
            config.track,
            {**config.model_dump(mode="json"), **task.facts},
            active=self.main and (config.track.artifact or not self.is_finished()),  # else there is nothing to log
            resume_step=resume_step,
        )

    def load(self) -> dict[str, Any]:
        """Load the newest checkpoint. Return its record, or {} if there is no checkpoint. Raises `UserError`."""
        # Only rank 0 lists the checkpoints, because a shared file system may show them late on other machines.
        checkpoints = self.group.on_main(lambda: list_checkpoints(self.run))
        objects = self.task.model, self.average, self.optimizers
        record, self.best_weights = load_newest(checkpoints, *objects, self.all_agree, main=self.main)
        if not record:
            snapshot = next((name for name in self.task.snapshots if (self.run / name).is_dir()), None)
            if snapshot and not (self.run / "state").is_dir():
                raise UserError(
                    f"{self.run}: contains {snapshot}/ but no state/ to continue from; nothing was overwritten. To "
                    f"start over, choose another out=, or delete {self.run}"
                )
            return {}
        if (now := self.task.init) and record["init"] != now["fingerprint"]:
            raise UserError(f"init: {now['source']} is not the model that this run started from; nothing was changed")
        steps, minutes = self.config.steps or math.inf, self.config.minutes or math.inf
        has_other_end = record["step"] != steps and record["end"] != [self.config.steps, self.config.minutes]
        if has_other_end and (record["step"] > steps or record["minutes"] >= minutes):
            raise UserError(
                f"{', '.join(END)}: {self.run} has already done {record['step']:,} steps in "
                f"{record['minutes']:.1f} minutes; set a later end; nothing was changed"
            )
        return record

    def record(self) -> dict[str, Any]:
        """Return the JSON part of a checkpoint."""
        return {
            "minutes": self.minutes,
            "scalars": self.scalars.to_json(),
            "skips": self.skips.tolist(),
            "evaluation": self.evaluation,
            "reported": self.reported,
            "best": self.best,
            "pending": self.pending,
            "precision": self.accelerator.mixed_precision,
            "init": self.task.init and self.task.init["fingerprint"],
            "end": [self.config.steps, self.config.minutes],
        }

    def require_room(self) -> None:
        weights = sum(value.nbytes for value in self.task.model.state_dict().values())
        moments = sum(2 * p.nbytes for parameters in self.task.param_groups.values() for p in parameters)
        needed, free = int(SPARE * (4 * weights + moments)), shutil.disk_usage(self.run).free
        if free < needed:
            raise UserError(f"{self.run}: saving needs {needed:,} bytes, but only {free:,} are free")

    # The loop

    def fit(self) -> None:
        """Train: evaluate, log, preview and save when due, then step, until `steps` or `minutes` is reached."""
        self.task.model.train()
        with closing(self.batches()) as stream, training_bar(self) as bar:
            pace, began, was_finished = Pace(), time.monotonic() - 60 * self.minutes, None
            while True:
                self.agree_on_end()
                progress, done = self.progress, self.is_done()
                was_finished = self.is_finished() if was_finished is None else was_finished
                due = self.due(done)
                if self.stopping and not done:
                    if self.step != self.saved_step:  # otherwise the loaded checkpoint is of this step
                        self.finish_writing()
                        self.pending, self.unsaved = sorted(due), ""
                        self.save_checkpoint()
                    break
                self.evaluate_and_save(due, progress, done, bar)
                if done:
                    break
                self.task.progress = progress
                pace.start_step()
                self.take_step(next(stream), learning_rate(self.config, self.step, progress))
                self.minutes = (time.monotonic() - began) / 60
                bar.update(1)
                pace.announce_once(self, bar)
        self.finish_writing()
        if done:
            self.tracker.finish(self.step, *summarize_run(self), self.reported)
        if self.main and not self.unsaved:
            print(f"{self.run}: {describe_end(self, done, bool(was_finished))}", flush=True)

    def agree_on_end(self) -> None:
        """Exchange the minutes of training and requests to stop with the other processes, between CPUs, so that no
        process waits for a GPU."""
        stopping = self.stop.is_requested()
        if self.group.world > 1:
            facts = torch.tensor([self.minutes if self.main else 0.0, float(stopping)], dtype=torch.float64)
            torch.distributed.all_reduce(facts, group=self.hosts)
            self.minutes, stopping = float(facts[0]), bool(facts[1])
        self.stopping |= stopping

    @property
    def progress(self) -> float:
        """Fraction of the schedule: by steps, or by minutes in a run without `steps`."""
        if not self.task.param_groups:  # nothing to train: evaluate, preview and save at step 0
            return 1.0
        if self.config.steps is not None:
            return self.step / self.config.steps
        assert self.config.minutes is not None
        return self.minutes / self.config.minutes

    def is_done(self) -> bool:
        return self.progress >= 1 or self.minutes >= (self.config.minutes or math.inf)

    def is_finished(self) -> bool:
        """Return whether the loaded checkpoint is of a finished run with nothing pending."""
        return self.step == self.saved_step and not self.pending and self.is_done()

    @property
    def cut(self) -> dict[str, Any]:
        """The limit in minutes that ended a finished run, and the steps that were planned; {} if it took them all."""
        if not self.task.param_groups or self.config.steps is None or self.step >= self.config.steps:
            return {}
        return {"minutes": self.config.minutes, "steps": self.config.steps}

    def due(self, done: bool) -> set[str]:
        """Return which of log, evaluate, preview and save are due at this step; right after resuming, those that the
        interrupted process left undone."""
        if self.step == self.saved_step:
            left, self.pending = set(self.pending), []
            return left
        names = ("log", "evaluate", "preview", "save")
        if self.step == 0 and not done:
            return {"preview"}
        return {name for name in names if done or self.step % getattr(self.config, f"{name}_every") == 0}

    def batches(self) -> Generator[list[Any], None, None]:
        """Yield this process's micro-batches for each step, on its device, and prefetch those of later steps.

        For a GPU, the output of `Task.batch` (images as uint8) is copied asynchronously from pinned memory, and
        `Task.prepare` runs on the GPU. For a CPU, the prefetching thread runs `Task.prepare`.
        """
        config, rank, world = self.config, self.group.rank, self.group.world
        shape = (config.accumulate, world, config.batch_size // config.accumulate // world)

        def make(step: int) -> list[Any]:
            indices, epochs = self.task.samples(config.batch_size, config.seed, step)
            mine = zip(indices.reshape(shape)[:, rank], epochs.reshape(shape)[:, rank], strict=True)
            micro = [self.task.batch(i, e, config.seed) for i, e in mine]
            if self.device.type == "cpu":
                return [self.task.prepare(batch) for batch in micro]
            return [pin_memory(batch) for batch in micro] if self.device.type == "cuda" else micro

        with closing(prefetch(make, count(self.step))) as stream:
            for micro in stream:
                if self.device.type != "cpu":
                    micro = [self.task.prepare(move_batch_async(batch, self.device)) for batch in micro]
                yield micro

    # A step

    def take_step(self, micro_batches: list[Any], lr: float) -> None:
        """Take an optimizer step for each parameter group in turn, then update the average."""
        seed = (self.config.seed * 1_000_003 + self.group.rank) * 1_000_003 + self.step
        torch.manual_seed(seed % (1 << 63))
        finite = [self.step_param_group(name, micro_batches, lr) for name in self.task.active_groups(self.step)]
        all_finite = torch.stack(finite).all()
        self.skips = torch.where(all_finite, self.skips * self.keep_total, self.skips + 1)
        self.update_average()
        self.step += 1
        if self.device.type == "cpu":  # reading a CPU tensor needs no synchronization
            self.check_skips()

    def step_param_group(self, group_name: str, micro_batches: list[Any], lr: float) -> Tensor:
        """Accumulate gradients over the micro-batches and step the group's optimizer. Skip the step if a scalar or the
        gradient norm is not finite on any process. Return whether all are finite, a bool on the device."""
        optimizer = self.optimizers[group_name]
        if len(self.task.param_groups) > 1:  # only this group gets gradients
            for name, parameters in self.task.param_groups.items():
                for parameter in parameters:
                    parameter.requires_grad_(name == group_name)
        terms = self.accumulate(group_name, micro_batches)
        norm = self.accelerator.clip_grad_norm_(self.task.param_groups[group_name], self.config.clip)
        terms["gradient_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        values = in_finest(torch.stack([value.to(self.device) for value in terms.values()]))
        if self.group.world > 1:  # a non-finite value on one process makes the mean non-finite
            torch.distributed.all_reduce(values)
            values /= self.group.world
        finite = torch.isfinite(values).all()
        for settings in optimizer.param_groups:
            settings["lr"] = lr * self.task.rates.get(group_name, 1.0)
        # Fused AdamW and our Muon skip the step if this is not 0.
        optimizer.found_inf = (~finite).float().to(self.task.param_groups[group_name][0].device)  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
        prefix = "" if len(self.task.param_groups) == 1 else f"{group_name}/"
        names = tuple(prefix + name for name in terms)
        self.last_terms[group_name] = names, values
        self.scalars.add(names, values, finite)
        return finite

    def accumulate(self, group_name: str, micro_batches: list[Any]) -> dict[str, Tensor]:
        """Accumulate gradients over the micro-batches (DDP reduces them after the last); return the mean of each logged
        scalar."""
        number, totals = len(micro_batches), dict[str, Tensor]()
        for index, batch in enumerate(micro_batches):
            with ExitStack() as stack:
                if index < number - 1 and not self.sharded:  # FSDP: unreduced gradients may not fit in memory
                    for net in self.task.nets.values():
                        stack.enter_context(self.accelerator.no_sync(net))
                loss, terms = self.task.loss(group_name, batch, self.step)
                self.accelerator.backward(loss / number)
            for name, value in {"loss": loss, **terms}.items():
                totals[name] = totals.get(name, 0.0) + value.detach().float() / number
        return totals

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the moving average of the weights; copy buffers, and the weights of the first step. The decay after n
        steps is min(ema_decay, (1 + n) / (10 + n)), so that early weights are soon forgotten."""
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step)) if self.step else 0.0
        averages: list[Tensor] = list(self.average.parameters())
        weights: list[Tensor] = list(self.task.model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for buffer, current in zip(self.average.buffers(), self.task.model.buffers(), strict=True):
            buffer.copy_(current)

    def check_skips(self) -> int:
        """Return the number of skipped steps. Raises `UserError` after ten in a row."""
        skipped, in_a_row = self.skips.tolist()
        if in_a_row >= MAX_SKIPPED:
            terms = [
                pair for names, values in self.last_terms.values() for pair in zip(names, values.tolist(), strict=True)
            ]
            culprits = [name for name, value in terms if not math.isfinite(value)]
            raise UserError(
                f"step {self.step}: {in_a_row} steps in a row were not finite ({', '.join(culprits)}). The last good "
                "checkpoint is kept; try a lower train.lr or train.clip"
            )
        return skipped

    # Evaluating and logging

    def evaluate_and_save(self, due: set[str], progress: float, done: bool, bar: Any) -> None:
        """Evaluate, log, preview and save when due. At the end of a run, everything except the checkpoint uses the
        final weights: the best ones, if they are known, as the task finishes them."""
        record: dict[str, float] = {}
        if due:
            self.check_skips()
        if "log" in due and self.scalars.sums:
            record = self.report(progress)
            show_report(self, record, bar)
        if "evaluate" in due:
            record |= self.evaluate()
        with self.swap_in_final_weights() if done and due else nullcontext():
            if done and "evaluate" in due:
                known = self.task.watched == "held_out" and not self.finished  # of these weights on these images
                self.reported = self.evaluation if known else self.evaluate_split("held_out")
                record |= {f"held_out/{name}": value for name, value in self.reported.items()}
            if record:
                self.tracker.log(self.step, record)
            if due & {"preview", "save"}:
                self.preview_and_save(due, done)
        if "save" in due:
            self.save_checkpoint()

    def report(self, progress: float) -> dict[str, float]:
        """Return speed, learning rate and the means of logged scalars since the last report."""
        record, self.scalars = self.scalars.read(), RunningMeans()
        record["learning_rate"] = learning_rate(self.config, self.step, progress)
        steps, seconds = self.step - self.since[0], max(1e-9, time.monotonic() - self.since[1])
        if steps:  # 0 right after resuming, when only a pending line is logged
            record["images_per_second"] = images = steps * self.config.batch_size / seconds
            record["tokens_per_second"] = images * self.task.tokens_per_row
        self.since = self.step, time.monotonic()
        return record | {"minutes": self.minutes, "skipped_steps": self.check_skips()}

    def evaluate(self) -> dict[str, float]:
        """Evaluate the averaged weights, on validation images if there are any, and remember the best."""
        split = self.task.watched
        self.evaluation = self.evaluate_split(split)
        score = self.task.score(self.evaluation)
        keeps = self.config.keep_best and self.task.param_groups and split == "validation" and score is not None
        if keeps and score > self.best.get("score", -math.inf):
            self.best = {"step": self.step, "score": score, "evaluation": self.evaluation}
            self.best_weights = self.collect_average()
        return {f"{split}/{name}": value for name, value in self.evaluation.items()}

    def evaluate_split(self, split: Split) -> dict[str, float]:
        """Evaluate a split and return its figures. On a GPU, use the mixed precision of training, which is several
        times faster. Drop figures that are not finite, with a warning."""
        group = replace(self.group, lockstep=self.sharded)
        with self.accelerator.autocast() if self.device.type == "cuda" else nullcontext():
            found = self.task.evaluate(self.average, split, group)
        dropped = [name for name, value in found.items() if not math.isfinite(value)]
        if dropped and self.main:
            tell(f"warning: step {self.step}: dropped {split} figures that are not finite: {', '.join(dropped)}")
        return {name: value for name, value in found.items() if name not in dropped}

    # Saving

    def collect_average(self) -> Tensors:
        """Return an unsharded copy of the averaged weights on the CPU of the main process; {} on the others."""
        if self.sharded:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return cast(Tensors, get_model_state_dict(self.average, options=options))
        return copy_to_cpu(self.average.state_dict()) if self.main else {}

    @contextmanager
    def swap_in_best_weights(self) -> Iterator[None]:
        """Inside the block, replace the averaged weights with the best ones, if any."""
        if not self.best or self.best["step"] == self.step:
            yield
            return
        last = {name: value.clone() for name, value in self.average.state_dict().items()}
        if self.group.world == 1:
            self.average.load_state_dict(self.best_weights or {})
        else:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            best: dict[str, Any] = dict(self.best_weights or {})
            set_model_state_dict(self.average, best, options=options)
        try:
            yield
        finally:
            self.average.load_state_dict(last)

    @contextmanager
    def swap_in_final_weights(self) -> Iterator[None]:
        """Inside the block, replace the averaged weights with those that the run delivers: the best ones, if any, as
        the task finishes them, unless it does not accept the result on validation images."""
        with self.swap_in_best_weights():
            weights = self.average.state_dict()
            changed = self.task.finish(self.average, self.group)
            before = {name: weights[name].clone() for name in changed}
            self.finished = bool(changed)
            try:
                load_values(weights, changed)
                if self.finished and self.task.watched == "validation":
                    self.finished_evaluation = self.evaluate_split("validation")
                    known = self.best["evaluation"] if self.best else self.evaluation
                    self.finished = self.task.accepts(self.finished_evaluation, known)
                    if not self.finished:
                        load_values(weights, before)
                yield
            finally:
                load_values(weights, before)

    @contextmanager
    def gather_average(self) -> Iterator[nn.Module | None]:
        """Yield the averaged model, unsharded, on the device. Under FSDP, yield it on the main process only (None
        elsewhere), and move it off the GPU after the block, because it may fill most of the memory."""
        if not self.sharded:
            yield self.average
            return
        weights = self.collect_average()
        if self.unsharded is None:
            yield None
            return
        self.unsharded.load_state_dict(weights)
        try:
            yield self.unsharded if offloads_to_cpu() else self.unsharded.to(self.device)
        finally:
            self.unsharded.to("cpu")

    def preview_and_save(self, due: set[str], done: bool) -> None:
        """Log previews and write the snapshot for users, when due. Previews run without CUDA graphs, to leave that
        memory to training."""
        if "save" in due:
            self.pending = []
        with self.gather_average() as average:
            if average is None:
                return
            pictures = {}
            if "preview" in due or self.task.shows_preview:
                with without_graphs():
                    pictures = self.task.preview(average, ALONE if self.sharded else self.group)
            if "preview" in due:
                self.tracker.images(self.step, pictures)
            if "save" in due and self.main:
                self.save_snapshot(average, pictures, done)

    def save_snapshot(self, average: nn.Module, pictures: dict[str, Any], done: bool) -> None:
        """Write the snapshot for users. If that fails, training continues, and the checkpoint records that the snapshot
        is pending."""
        self.unsaved = ""
        facts = {"steps": self.step, "minutes": round(self.minutes, 3), **describe_snapshot(self, done)}
        if done and self.cut:
            facts["cut"] = self.cut
        if url := self.tracker.run_url:
            facts["run_url"] = url
        try:
            self.task.save(average, self.run, facts, pictures)
        except (OSError, SafetensorError, PathError) as error:
            self.pending = ["save"]
            self.warn_unsaved(self.step, error)

    def save_checkpoint(self) -> None:
        """Save a checkpoint. A thread writes a copy while training continues; sharded weights are written synchronously
        by all processes.

        If the disk is full or unavailable, warn, keep the older checkpoints, and continue until the next save.
        """
        self.finish_writing()
        self.saved_step = self.step
        if not self.pending:
            self.unsaved = ""
        tensors, may_save = collect_tensors(self.task.model, self.average, self.optimizers), True
        try:
            self.tracker.flush()  # the metrics up to this step must be on the disk first
            if not is_finite(tensors):
                raise OSError("a weight is not finite")
        except OSError as error:
            self.warn_unsaved(self.step, error)
            may_save = False
        if not self.all_agree(may_save):
            return
        best = self.best_weights if self.main else None
        facts: dict[str, Any] = {"main": self.main, "sharded": self.sharded}
        if self.sharded:
            self.write(self.step, partial(write_checkpoint, self.run, self.step, tensors, self.record(), best, **facts))
        elif self.main:
            copies, record = copy_to_cpu(tensors), copy.deepcopy(self.record())
            write = partial(write_checkpoint, self.run, self.step, copies, record, best, **facts)
            self.writing = self.writer.submit(self.write, self.step, write)

    def write(self, step: int, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
            self.warn_unsaved(step, error)

    def finish_writing(self) -> None:
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def warn_unsaved(self, step: int, error: Exception) -> None:
        """On the main process, warn that something was not saved, and remember it for the end of the run."""
        if self.main:
            self.unsaved = f"step {step}: {self.run}: {error}"
            tell(f"warning: not saved: {self.unsaved}; older checkpoints are kept")

    def all_agree(self, value: bool) -> bool:
        if self.group.world == 1:
            return value
        total = torch.tensor(float(value))
        torch.distributed.all_reduce(total, group=self.hosts)
        return bool(total == self.group.world)

    def close(self) -> None:
        self.writer.shutdown()
        self.tracker.close()


def load_values(weights: dict[str, Any], values: Tensors) -> None:
    for name, value in values.items():
        weights[name].copy_(value)
