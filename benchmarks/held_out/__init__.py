"""Problems on which no setting of `KFACOptimizer` is chosen: data, models and losses of their own.

Their sizes were fixed with AdamW alone. They are run once, when all choices are made, and are no
longer held out once their results have changed anything.
"""

from __future__ import annotations

from benchmarks.held_out import functions, images, sequences, tables
from benchmarks.problems.problem import Problem

MODULES = (tables, images, sequences, functions)

PROBLEMS: dict[str, Problem] = {
    problem.name: problem for module in MODULES for problem in module.PROBLEMS
}
