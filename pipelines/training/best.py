"""The best weights of a run: the averaged weights with the best figure on validation images, when they were evaluated.

They are kept whole, on the CPU of the main process, which sends them to the others at the end of a run.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .state import Training


def keep_if_best(training: Training, average: nn.Module) -> None:
    """Keep a copy of `average` if its evaluation, which was just made, is better than any before it."""
    task = training.task
    if not (training.config.keep_best and task.players and task.watched == "validation"):
        return
    score = task.score(training.evaluation)
    if score is None or score <= training.best.get("score", -math.inf):
        return
    training.best = {"step": training.step, "score": score, "evaluation": training.evaluation}
    if task.team.leads:
        state = average.state_dict().items()
        training.best_weights = {name: value.detach().to("cpu", copy=True) for name, value in state}


def final_weights(training: Training, average: nn.Module) -> nn.Module:
    """What a run leaves at its end: the best weights, where there are any, in a module like `average`, on each process
    that has one."""
    if not training.best or training.best["step"] == training.step:
        return average
    model = average if training.sharded else copy.deepcopy(average)  # a sharded run's is a copy, made for this
    if training.task.team.leads:
        assert training.best_weights is not None
        model.load_state_dict(training.best_weights)
    training.task.team.send(model.state_dict().values())
    return model


def figures_of(training: Training, done: bool) -> dict[str, Any]:
    """What is known of the weights that a snapshot holds: figures by name, of how many images of a split they are, and,
    at the end of a run, which step's weights they are."""
    task = training.task
    evaluation = training.best["evaluation"] if done and training.best else training.evaluation
    if task.watched == "validation":
        evaluation = {f"validation_{name}": value for name, value in evaluation.items()}
    facts: dict[str, Any] = {"evaluation": evaluation, "images": {task.watched: task.evaluated[task.watched]}}
    if done:
        facts = {"evaluation": evaluation | training.reported, "images": task.evaluated}
        if training.best:
            facts["best_step"] = training.best["step"]
    return facts
