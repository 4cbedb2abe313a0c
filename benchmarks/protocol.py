"""The stages of the comparison: calibrate, tune the baselines, freeze targets, tune the rest.

1. *Calibration*: the cost of a step of every contestant on every problem, interleaved. The budget
   of a problem in seconds, divided by it, is the number of steps that a contestant gets.
2. *Baselines*: SGD and AdamW make their trials, quasi-random points and their defaults. The trial
   with the best metric of each, and its defaults, run on all seeds. The lowest of the medians over
   seeds of the best metric is the problem's target, unless the metric resolves less. It is written
   once and not changed by what comes later.
3. *Trials* of all contestants, on a seed of their own. The trial that reaches the target first (in
   seconds; if none does, the one with the best metric) is the contestant's tuned setting.
4. *Finals*: tuned settings and defaults on all seeds.

A run is a file; what exists with the same configuration is not repeated.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.calibration import GRADIENT, calibrated
from benchmarks.contestants import BASELINES, Contestant, all_contestants
from benchmarks.environment import commit
from benchmarks.problems import PROBLEMS
from benchmarks.running import OVERTIME, Run, run
from benchmarks.tuning import DEFAULT, Trial, trials

TUNING_SEED = 1000


@dataclass(frozen=True)
class Options:
    """What a comparison covers.

    Attributes:
        folder: Where results are.
        problems: Names.
        contestants: Names.
        trials: How many for each contestant and problem, besides the defaults.
        seeds: How many for finals.
        scale: Factor of the problems' budgets.
        calibration_rounds: How often the cost of a step is measured; see `calibrate`.
        minimal_steps: A budget has at least that many.
        baseline_trials: How many trials for SGD and AdamW, if not as many as for the others.
    """

    folder: Path
    problems: tuple[str, ...]
    contestants: tuple[str, ...]
    trials: int = 8
    seeds: int = 3
    scale: float = 1.0
    calibration_rounds: int = 5
    minimal_steps: int = 40
    baseline_trials: int | None = None


@dataclass(frozen=True)
class Job:
    """A run that is to be made if its file does not exist."""

    problem: str
    contestant: str
    trial: Trial
    seed: int
    steps: int
    limit: float
    folder: Path

    @property
    def path(self) -> Path:
        """The result file."""
        name = f"{self.contestant}-{self.trial.name}-seed{self.seed}.json"
        return self.folder / "runs" / self.problem / name

    def read(self) -> Run | None:
        """Return the run if it exists with the same configuration."""
        if not self.path.exists():
            return None
        found = json.loads(self.path.read_text())
        found["curve"] = [tuple(row) for row in found["curve"]]
        same = json.loads(json.dumps(self.trial.record())) == found["configuration"]
        steps = max(2, round(self.trial.schedule.horizon * self.steps))
        return Run(**found) if same and steps == found["steps"] else None


def perform(job: Job) -> None:
    """Make a run and write its file."""
    contestant = all_contestants()[job.contestant]
    found = run(PROBLEMS[job.problem], contestant, job.trial, job.seed, job.steps, job.limit)
    write_json(job.path, found.record() | {"commit": commit()})


def write_json(path: Path, content: Any) -> None:
    """Write a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content) + "\n")
    part.replace(path)


class Comparison:
    """The stages, on a map that performs jobs.

    Args:
        options: What is compared.
        map_jobs: Applies a function to items, in any order.
    """

    def __init__(self, options: Options, map_jobs: Callable[[Any, Iterable], Iterable]) -> None:
        self.options, self._map = options, map_jobs
        known = all_contestants()
        self.contestants = [known[name] for name in options.contestants]
        self._costs: dict[str, dict[str, float]] = {}

    def entrants(self, problem: str) -> list[Contestant]:
        """Return who takes part in a problem."""
        return [c for c in self.contestants if c.enters(problem)]

    # Calibration -----------------------------------------------------------------------------

    def costs(self, problem: str) -> dict[str, float]:
        """Return the calibrated seconds per step."""
        if problem not in self._costs:
            path = self._calibration_path(problem)
            self._costs[problem] = json.loads(path.read_text()) if path.exists() else {}
        return self._costs[problem]

    def calibrate(self) -> None:
        """Measure what was not measured, all contestants of a problem anew where one is missing."""
        rounds, missing = self.options.calibration_rounds, []
        for problem in self.options.problems:
            names = tuple(c.name for c in self.entrants(problem))
            if not {GRADIENT, *names} <= self.costs(problem).keys():
                missing.append((problem, names, rounds))
        found = self._map(calibrated, missing)
        for problem, costs in self._progress(found, "calibration", len(missing)):
            known = self.costs(problem)
            # Those measured before keep their number of steps, and tie both runs together.
            common = [known[name] / costs[name] for name in known.keys() & costs.keys()]
            drift = statistics.median(common) if common else 1.0
            merged = {name: drift * value for name, value in costs.items()} | known
            write_json(self._calibration_path(problem), merged)
            self._costs[problem] = merged

    def forget(self, names: Iterable[str]) -> None:
        """Forget the cost and the runs of contestants, to measure a new version of them.

        Args:
            names: The contestants; targets stay.
        """
        for problem in self.options.problems:
            kept = {name: c for name, c in self.costs(problem).items() if name not in set(names)}
            write_json(self._calibration_path(problem), kept)
            self._costs[problem] = kept
            for name in names:
                for path in (self.options.folder / "runs" / problem).glob(f"{name}-*.json"):
                    path.unlink()

    def _calibration_path(self, problem: str) -> Path:
        return self.options.folder / "calibration" / f"{problem}.json"

    def steps(self, problem: str, contestant: str) -> int:
        """Return how many steps a contestant gets."""
        budget = self.options.scale * PROBLEMS[problem].budget
        return max(self.options.minimal_steps, round(budget / self.costs(problem)[contestant]))

    # Runs ------------------------------------------------------------------------------------

    def job(self, problem: str, contestant: str, trial: Trial, seed: int) -> Job:
        """Return the job of one run."""
        limit = OVERTIME * max(1.0, self.options.scale * PROBLEMS[problem].budget)
        steps = self.steps(problem, contestant)
        return Job(problem, contestant, trial, seed, steps, limit, self.options.folder)

    def trials(self, contestant: Contestant) -> list[Trial]:
        """Return a contestant's trials: points of its space, and its defaults.

        A few points of a space may all be worse than what authors of an optimizer found in years.
        """
        options = self.options
        more = options.baseline_trials if contestant in BASELINES else None
        count = options.trials if more is None else more
        points = trials(contestant.space, count, not contestant.all_data)
        return [*points, DEFAULT]

    def trial_jobs(self, problem: str, contestant: Contestant) -> list[Job]:
        """Return the jobs that tune a contestant."""
        name = contestant.name
        return [self.job(problem, name, t, TUNING_SEED) for t in self.trials(contestant)]

    def final_jobs(self, problem: str, contestant: str, trial: Trial) -> list[Job]:
        """Return the jobs of a setting on all seeds."""
        return [self.job(problem, contestant, trial, seed) for seed in range(self.options.seeds)]

    def perform(self, jobs: Iterable[Job], stage: str) -> None:
        """Make the runs that do not exist, contestants interleaved."""
        by_path = {job.path: job for job in jobs}  # tuned settings may be the defaults
        missing = [job for job in by_path.values() if job.read() is None]
        missing.sort(key=lambda job: (job.seed, job.problem, job.trial.name))
        for _ in self._progress(self._map(perform, missing), stage, len(missing)):
            pass

    @staticmethod
    def _progress(items: Iterable, stage: str, total: int | None = None) -> Iterable:
        return tqdm(items, desc=stage, total=total, mininterval=5)

    # Stages ----------------------------------------------------------------------------------

    def target(self, problem: str) -> dict[str, Any] | None:
        """Return the frozen target: its value and whose it is."""
        path = self.options.folder / "targets.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        return known.get(problem)

    def _best_trial(self, problem: str, contestant: Contestant) -> Trial:
        """Return the trial with the best metric."""
        runs = [job.read() for job in self.trial_jobs(problem, contestant)]
        bests = [found.best for found in runs if found is not None]
        return self.trials(contestant)[bests.index(min(bests))]

    def tuned_trial(self, problem: str, contestant: Contestant) -> Trial | None:
        """Return the trial that reaches the target first, else the one with the best metric."""
        target = self.target(problem)
        runs = [job.read() for job in self.trial_jobs(problem, contestant)]
        if target is None or not runs or any(found is None for found in runs):
            return None
        keys = [(r.first_reach(target["value"])[1], r.best) for r in runs if r is not None]
        return self.trials(contestant)[keys.index(min(keys))]

    def freeze_targets(self) -> None:
        """Tune the baselines and write the targets of problems that have none yet."""
        names = {c.name for c in BASELINES}
        baselines = [c for c in self.contestants if c.name in names]
        unfrozen = [p for p in self.options.problems if self.target(p) is None]
        if unfrozen and len(baselines) < len(BASELINES):
            raise ValueError(f"contestants: {sorted(names)} must take part to set the targets.")
        pairs = [(p, c) for p in unfrozen for c in baselines]
        self.perform([j for p, c in pairs for j in self.trial_jobs(p, c)], "baseline trials")
        judged = [(p, c.name, t) for p, c in pairs for t in (self._best_trial(p, c), DEFAULT)]
        finals = {(p, name, t.name): self.final_jobs(p, name, t) for p, name, t in judged}
        self.perform([j for jobs in finals.values() for j in jobs], "baseline finals")
        path = self.options.folder / "targets.json"
        targets = json.loads(path.read_text()) if path.exists() else {}
        for problem in unfrozen:
            medians = {}
            for (own, name, trial), jobs in finals.items():
                if own == problem:
                    runs = [job.read() for job in jobs]
                    medians[name, trial] = statistics.median(r.best for r in runs if r is not None)
            (holder, setting), median = min(medians.items(), key=lambda item: item[1])
            value = max(median, PROBLEMS[problem].resolution)
            targets[problem] = {"value": value, "holder": holder, "trial": setting}
        write_json(path, targets)

    def complete(self) -> None:
        """Run every stage."""
        self.calibrate()
        self.freeze_targets()
        pairs = [(p, c) for p in self.options.problems for c in self.entrants(p)]
        self.perform([j for p, c in pairs for j in self.trial_jobs(p, c)], "trials")
        jobs = [j for p, c in pairs for j in self.final_jobs(p, c.name, DEFAULT)]
        for problem, contestant in pairs:
            trial = self.tuned_trial(problem, contestant)
            assert trial is not None
            jobs += self.final_jobs(problem, contestant.name, trial)
        self.perform(jobs, "finals")
