"""The problems of the comparison, by name. A module here joins by its `PROBLEMS`."""

from __future__ import annotations

from benchmarks.problems import autoencoders, language, pinns, regression, vision
from benchmarks.problems.problem import Problem

MODULES = (autoencoders, pinns, regression, vision, language)

PROBLEMS: dict[str, Problem] = {
    problem.name: problem for module in MODULES for problem in module.PROBLEMS
}
