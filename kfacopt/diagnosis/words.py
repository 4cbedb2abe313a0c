"""What the operators' errors say, by the names and the possibilities of `kfacopt.diagnose`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

WRAPPING = (
    " Its parameters stay the same, so that an optimizer that was made for them fits the wrapper, "
    "too (docs/diagnose.md shows one)."
)
NOISE = (
    "Its forward pass draws random numbers (noise, a latent variable, functional dropout without "
    "training=self.training). Let it draw in training mode alone, `if self.training:`."
)
NO_CURVATURE = (
    "has no curvature in the model's predictions (its Hessian there is 0, or has no positive "
    "part), so that there is no exact GGN to compare K-FAC with. KFACOptimizer trains it all the "
    "same, and optimizer.describe() says by what: by the empirical Fisher, or by the curvature of "
    "functions that follow the last layer (a sigmoid, say), which are a part of the model here. A "
    "smooth loss beside it, like nn.SmoothL1Loss, can be looked at."
)
# The beginning of an operator's error, and what `diagnose` says in its place.
_REPLACED = {
    r"^model_func: not deterministic, its predictions for batch (\d+) .*": (
        r"model: not deterministic, its predictions for batch \1 differ between two passes over "
        rf"the same data, in evaluation mode. {NOISE}"
    ),
    r"^(model_func must return one tensor.*)": rf"\1{WRAPPING}",
    r"^(loss_func: \S+) has no curvature: .*": rf"\1 {NO_CURVATURE}",
    r"Its gradients have an empirical Fisher \(EFLinearOperator, [^)]*\);": (
        "KFACOptimizer trains it by the empirical Fisher, which is no curvature to compare with;"
    ),
    r"^(data: each batch must be a pair \(X, y\), got a) dict\b.*": (
        r'\1 dict. Pair what the model takes with what the loss takes: [(b, b["y"]) for b in '
        r"loader], with the name of your targets for y."
    ),
    r"^(data: each batch must be a pair \(X, y\), got a \w+ of \d+)\..*": (
        r"\1. Pair what the model takes with what the loss takes: [((a, b), y) for a, b, y in "
        r"loader], with a model that takes the pair (a, b) as one argument."
    ),
}


def in_own_words(sentence: str) -> str:
    """Return an error's sentence by the names of the arguments of `kfacopt.diagnose`."""
    for pattern, new in _REPLACED.items():
        sentence = re.sub(pattern, new, sentence, flags=re.DOTALL)
    return re.sub(r"\bmodel_func\b", "model", sentence)


@contextmanager
def own_words() -> Iterator[None]:
    """Raise what operators raise, of the same type, in the words of `kfacopt.diagnose`."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        said, own = str(error), in_own_words(str(error))
        if own == said:
            raise
        raise type(error)(own).with_traceback(error.__traceback__) from None
