"""How well the columns of held-out images are inferred from their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..inference.infer import POINTS, infer_tokens
from ..inference.posterior import Posterior
from ..inference.scales import digest_tokens
from ..processes.group import ALONE, ProcessGroup
from ..shuffling import spread_rows
from ..tokens import TokenSplit
from .likelihood import EVALUATED_ROWS, rows_at_a_time

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline

DENSITIES, LEAST = 20_000, 50
"""How many densities are evaluated for a column, and how many rows at least."""
BINS = 15
"""Bins of confidence."""
PREFIX = "inferred_"


@torch.no_grad()
def evaluate_columns(pipeline: ImagePipeline, test: TokenSplit, group: ProcessGroup = ALONE) -> dict[str, Any]:
    """Return, for each column that can be inferred, while no other is given: the share of right classes or flags, or
    the mean distance of the mean of a number or angle; the mean log probability, or density, of the true value; the
    calibration error; and, if it is calibrated, how often the regions of .9 contain the true value of images that were
    not used for that. Empty for a prior whose likelihood is a bound."""
    found = dict[str, Any]()
    for name, column in pipeline.columns.items():
        values = column.list_values()
        count = len(values) if values is not None else POINTS if column.span else 0
        if not pipeline.prior.exact or not 0 < count <= DENSITIES // LEAST or name not in test.given.rows:
            continue
        known = np.flatnonzero(~column.is_null(test.given[:].rows[name]).cpu().numpy())
        rows = known[spread_rows(len(known), min(EVALUATED_ROWS, max(LEAST, DENSITIES // count)))]
        size = rows_at_a_time(pipeline.prior.grid)

        def score(start: int, name: str = name, rows: Any = rows, size: int = size) -> Tensor:
            return score_rows(pipeline, test, name, rows[start : start + size])

        if len(rows):
            scores = torch.cat(group.map(score, range(0, len(rows), size))).double()
            found |= {f"{PREFIX}{name}_{key}": value for key, value in summarize(scores, column.span is None).items()}
    return found


def score_rows(pipeline: ImagePipeline, test: TokenSplit, name: str, rows: np.ndarray) -> Tensor:
    """Return the scores of rows; whether a region contains the true value is NaN for images that were used for it."""
    truth = pipeline.columns[name].to_targets(test.given[rows].rows[name].cpu())
    tokens = test.rows(rows).to(pipeline.device)
    posterior = infer_tokens(pipeline, tokens, test.given[rows].without(), name)
    fit = pipeline.inference.find(name, ())
    used = [fit is not None and digest in fit.digests for digest in digest_tokens(tokens)]
    scores = score_posterior(posterior, truth)
    scores[torch.tensor(used), -1] = torch.nan
    return scores


def score_posterior(posterior: Posterior, truth: Tensor) -> Tensor:
    """Return for each row `(n, 5)`: its error; the log score; the confidence in the mode; the mass that is denser than
    the true value; and whether the region of .9 contains it, NaN if there is no such region."""
    log_score = posterior.log_density_at(truth)
    denser = posterior.denser(log_score[:, None])[:, 0]
    levels = [scale.level(0.9) if len(scale.denser) >= 9 else torch.nan for scale in posterior.scales]
    bound = torch.tensor(levels, dtype=torch.float64)
    covered = torch.where(bound.isnan(), torch.nan, (denser < bound).double())
    return torch.stack([posterior.errors(truth), log_score, posterior.probabilities.max(1).values, denser, covered], 1)


def summarize(scores: Tensor, is_listed: bool) -> dict[str, float]:
    """Return the figures of scored rows. The calibration error of listed values is the mean over bins of confidence of
    the difference to the share that is right; of a range, the mean difference of the mass denser than the true value
    from even quantiles."""
    errors, log_score, confidence, denser, covered = scores.unbind(1)
    if is_listed:
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, confidence - (1 - errors))
        error = float(gaps.abs().sum() / len(errors))
    else:
        even = (torch.arange(len(denser), dtype=torch.float64) + 0.5) / len(denser)
        error = float((denser.sort().values - even).abs().mean())
    return {
        **({"accuracy": 1 - float(errors.mean())} if is_listed else {"error": float(errors.mean())}),
        "log_score": float(log_score.mean()),
        "calibration_error": error,
        **({} if bool(covered.isnan().all()) else {"coverage": float(covered.nanmean())}),
        "rows": len(scores),
    }
