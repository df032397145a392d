"""Which settings of sampling are best: a search by Frechet distance that is affordable, and what it may not cost.

All settings are tried with the same seeds (common random numbers: the noise of a comparison is that of what differs).
A line of guidance comes first, constant and with a course; then what lies beside the best of it; then temperature and
filters there. The best of many trials is best by luck, too: the finalists are drawn again, more of them and with other
seeds, and only these figures choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from prior.sampling import SamplingOptions

CONSTANTS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
ENDS = {"linear": (2.0, 3.0, 4.0, 6.0), "power-cosine": (3.0, 4.5, 7.0, 10.0)}
POWER, OTHER_POWERS, OTHER_STARTS = 1.5, (0.75, 3.0), (0.5, 1.5)
TEMPERATURES = (0.85, 0.92, 1.08, 1.16)
TOP_P = (0.98, 0.95, 0.9)
TOP_K = (4, 16)  # the vocabulary, divided by these
FARTHER, STEPS_BEYOND = 1.5, 2  # a line whose best is its last goes on so far, so many times
HOPELESS = 1.25  # times the lowest distance: a course whose best is above it is not refined
FINALISTS, FINAL_TIMES, FINAL_SEED = 4, 2, 1 << 24
UNITS = 45  # trials that a search takes, those of the finals counted by their images
RECALL_KEPT, AGREEMENT_LOST = 0.75, 0.03

RULE = (
    f"the lowest Frechet distance of finalists that keep {RECALL_KEPT:.0%} of the recall at temperature 1 without "
    "guidance and filters, and whose class agreement is that of real validation images, or, where it is less, at most "
    f"{AGREEMENT_LOST:.2f} below the highest of these"
)


@dataclass(frozen=True)
class Scores:
    """Of samples: their Frechet distance and recall against validation images, and class agreement (None: there are no
    classes)."""

    frechet_distance: float
    recall: float
    class_agreement: float | None = None


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, with so many images of these seeds on, and how long that took."""

    stage: str
    sampler: SamplingOptions
    num_images: int
    seed: int
    scores: Scores
    seconds: float

    @property
    def distance(self) -> float:
        """What is to be low."""
        return self.scores.frechet_distance


HEAD = f"{'stage':<12} {'settings':<46} {'Frechet':>8} {'recall':>7} {'agreement':>9} {'seconds':>8}"

Judge = Callable[[str, SamplingOptions, int, int], Trial]
"""Tries settings in a stage, with so many images, from a seed on."""


class OutOfTime(Exception):
    """There is no time for another trial before the finals."""


def plain(sampler: SamplingOptions) -> SamplingOptions:
    """`sampler` at temperature 1, without guidance and filters: the model as it is."""
    return replace(sampler.unguided(), temperature=1.0, top_k=None, top_p=None)


def course_of(sampler: SamplingOptions) -> str:
    """How its guidance goes."""
    if sampler.guidance_end is None:
        return "constant"
    return "linear" if sampler.guidance_power is None else "power-cosine"


def told(sampler: SamplingOptions) -> str:
    """The settings in words."""
    words = [f"guidance {sampler.guidance_scale:.4g}"] if sampler.guides else []
    if not sampler.has_constant_scale:
        words = [f"{words[0]} to {sampler.guidance_end:.4g}"]
        words += [] if sampler.guidance_power is None else [f"power {sampler.guidance_power:.4g}"]
    words += [] if sampler.temperature == 1 else [f"temperature {sampler.temperature:.4g}"]
    words += [f"top-k {sampler.top_k}"] if sampler.top_k is not None else []
    words += [f"top-p {sampler.top_p:.4g}"] if sampler.top_p is not None else []
    return ", ".join(words) or "plain"


def line_of(trial: Trial) -> str:
    """A line of the table."""
    scores = trial.scores
    agreed = "-" if scores.class_agreement is None else f"{scores.class_agreement:.3f}"
    return (
        f"{trial.stage:<12} {told(trial.sampler):<46} {scores.frechet_distance:>8.3f} {scores.recall:>7.3f} "
        f"{agreed:>9} {trial.seconds:>8.1f}"
    )


def best_of(trials: Iterable[Trial], recall: float, agreement: float | None) -> list[Trial]:
    """By `RULE`, in ascending order of their distance, where plain settings have this `recall`, and real images this
    class `agreement`, None if there are no classes. Where none keeps enough recall, that does not count."""
    ordered = sorted(trials, key=lambda trial: trial.distance)
    wide = [trial for trial in ordered if trial.scores.recall >= RECALL_KEPT * recall] or ordered
    if agreement is None:
        return wide
    agreed = [trial.scores.class_agreement or 0.0 for trial in wide]
    needed = min(agreement, max(agreed) - AGREEMENT_LOST)
    return [trial for trial, mine in zip(wide, agreed, strict=True) if mine >= needed]


class Search:
    """Trials of settings, from those `own` to a pipeline on. guided: whether there are classes to guide towards;
    real_agreement: the class agreement of real images, if there is one; num_images: of a trial, finalists have
    `FINAL_TIMES` as many; left: the seconds that are left."""

    def __init__(
        self,
        judge: Judge,
        own: SamplingOptions,
        *,
        guided: bool,
        vocab_size: int,
        num_images: int,
        seed: int = 0,
        real_agreement: float | None = None,
        left: Callable[[], float] = lambda: float("inf"),
    ) -> None:
        self.judge, self.own, self.guided, self.vocab_size = judge, own, guided, vocab_size
        self.num_images, self.seed, self.left = num_images, seed, left
        self.real_agreement = real_agreement
        self.trials: list[Trial] = []
        self.finals: list[Trial] = []
        self.ended = ""

    def run(self) -> Trial:
        """Search, and return the trial of the settings that are chosen, one of the `finals`."""
        for sampler in (plain(self.own), self.own):
            self.tried("reference", sampler)
        try:
            if self.guided:
                self.search_guidance()
            self.search_temperature()
            self.search_filters()
        except OutOfTime:
            self.ended = "the time was up before all of the search was done"
        return self.decide()

    def tried(self, stage: str, sampler: SamplingOptions) -> Trial:
        """The trial of these settings, which may have been made before. Raises `OutOfTime`."""
        for trial in self.trials:
            if trial.sampler == sampler:
                return trial
        slowest = max((trial.seconds for trial in self.trials), default=0.0)
        finals = FINAL_TIMES * (FINALISTS + 2) * slowest
        if stage != "reference" and self.left() < finals + slowest:
            raise OutOfTime
        self.trials.append(self.judge(stage, sampler, self.num_images, self.seed))
        return self.trials[-1]

    def ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """By `RULE`. The first trial of a search is of plain settings."""
        return best_of(trials, self.trials[0].scores.recall, self.real_agreement)

    def best(self) -> Trial:
        """Of all trials so far."""
        return self.ranked(self.trials)[0]

    # Stages

    def line(self, course: str, values: Sequence[float]) -> list[Trial]:
        """Trials along a line of guidance, on from its end while that is the best."""
        base, made = plain(self.own), list[Trial]()
        todo = list(values)
        while todo:
            made.append(self.tried("guidance", with_course(base, course, todo.pop(0))))
            is_last = not todo and self.ranked(made)[0] is made[-1]
            if is_last and len(made) < len(values) + STEPS_BEYOND:
                todo.append(round(strength(made[-1].sampler) * FARTHER, 1))
        return made

    def search_guidance(self) -> None:
        """Constant guidance, and guidance that goes to an end; then what lies beside the best of each."""
        lines = {"constant": self.line("constant", CONSTANTS)}
        lines |= {course: self.line(course, ends) for course, ends in ENDS.items()}
        peaks = {course: self.ranked(line)[0] for course, line in lines.items()}
        lowest = min(peak.distance for peak in peaks.values())
        for course, peak in peaks.items():
            if peak.distance <= HOPELESS * lowest:
                for value in beside(peak, lines[course]):
                    self.tried("beside", with_course(plain(self.own), course, value))
        best = self.best().sampler
        if best.guidance_end is not None:
            for start in OTHER_STARTS:
                self.tried("start", replace(best, guidance_scale=start))
        if best.guidance_power is not None:
            best = self.best().sampler
            for power in OTHER_POWERS if best.guidance_power == POWER else ():
                self.tried("power", replace(best, guidance_power=power))

    def search_temperature(self) -> None:
        """Temperatures about that of the best so far, which is 1 unless the pipeline's own is better."""
        best = self.best().sampler
        for factor in TEMPERATURES:
            self.tried("temperature", replace(best, temperature=round(best.temperature * factor, 3)))

    def search_filters(self) -> None:
        """Masses and counts of ids to draw from."""
        best = self.best().sampler
        for mass in TOP_P:
            self.tried("top-p", replace(best, top_p=mass))
        for part in TOP_K:
            if self.vocab_size // part > 1:
                self.tried("top-k", replace(best, top_k=self.vocab_size // part))

    def decide(self) -> Trial:
        """The best of the finalists, which are drawn again with other seeds."""
        ahead = [trial.sampler for trial in self.ranked(self.trials)[:FINALISTS]]
        images, seed = FINAL_TIMES * self.num_images, self.seed + FINAL_SEED
        for sampler in dict.fromkeys([plain(self.own), self.own, *ahead]):
            self.finals.append(self.judge("final", sampler, images, seed))
        return best_of(self.finals, self.finals[0].scores.recall, self.real_agreement)[0]

    def final_of(self, sampler: SamplingOptions) -> Trial:
        """The trial of these settings in the finals."""
        return next(trial for trial in self.finals if trial.sampler == sampler)


def with_course(base: SamplingOptions, course: str, value: float) -> SamplingOptions:
    """`base` with constant guidance of this scale, or with guidance from 1 to it."""
    if course == "constant":
        return replace(base, guidance_scale=value)
    return replace(base, guidance_end=value, guidance_power=POWER if course == "power-cosine" else None)


def strength(sampler: SamplingOptions) -> float:
    """The scale of guidance, or that at its end."""
    return sampler.guidance_scale if sampler.guidance_end is None else sampler.guidance_end


def beside(peak: Trial, line: Sequence[Trial]) -> list[float]:
    """The middles between the strength of the `peak` of a line and those next to it; all lines begin at 1."""
    strengths = sorted({1.0, *(strength(trial.sampler) for trial in line)})
    at = strengths.index(strength(peak.sampler))
    near = strengths[max(0, at - 1) : at] + strengths[at + 1 : at + 2]
    return [round((value + strengths[at]) / 2, 3) for value in near]
