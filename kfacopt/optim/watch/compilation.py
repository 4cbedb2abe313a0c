"""`torch.compile`: passes with hooks run uncompiled, all others run their compiled code as it is.

A hook that the compiler meets inside a module is traced: it breaks the graph, and the pieces stay
for the steps without hooks. One that is added after the first compiled call is ignored. Hooks of
the module that is called, however, run before the compiler looks at its forward pass: they keep it
from looking.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame


def leave_hooks_uncompiled(probed: type[Tensor]) -> None:
    """Keep the compiler from tracing kfacopt's own code, if there is a compiler in the process.

    Args:
        probed: Tensors that it must not trace operations on: these are seen where they run.
    """
    if "torch._dynamo" in sys.modules:
        import torch._dynamo.trace_rules as rules

        rules.add("kfacopt")
        kept_out = getattr(torch._dynamo.config, "nontraceable_tensor_subclasses", None)
        if kept_out is not None:
            kept_out.add(probed)


def is_called_from_compiled_code() -> bool:
    """Tell whether the running code was called from a compiled module or function."""
    return bool(eval_frame.get_eval_frame_callback())


def run_uncompiled() -> bool:
    """Run the rest of the call of a compiled module or function uncompiled.

    Every call of compiled code sets up the compiler anew and puts it away in the end, also after an
    exception; so there is nothing to undo.

    Returns:
        Whether it would have been compiled.
    """
    if not is_called_from_compiled_code():
        return False
    eval_frame.set_eval_frame(None)
    count_frames = getattr(eval_frame, "set_fullgraph_compiled_frame_count", None)
    if count_frames is not None:  # fullgraph=True complains where nothing was compiled
        count_frames(-1)
    return True


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Run compiled functions and modules eagerly for a while."""
    if "torch._dynamo" not in sys.modules or is_called_from_compiled_code():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class EagerSpell:
    """A time in which compiled functions and modules run eagerly: as long as someone needs it.

    A compiled loss hides the loss function that it calls, and compiled parts of a model their
    layers' hooks. (The compiler could not trace either: a bare `nn.Sequential` with hooks fails
    with a RecursionError.)
    """

    def __init__(self) -> None:
        """Start with nobody."""
        self._owners: set[int] = set()
        self._stance: Any = None

    def begin(self, owner: object) -> None:
        """Run compiled code eagerly until `end` is called for an owner, or it is gone."""
        if "torch._dynamo" not in sys.modules or is_called_from_compiled_code():
            return
        self._owners.add(id(owner))
        weakref.finalize(owner, self._end, id(owner)).atexit = False
        if not self._in_force():
            self._stance = torch.compiler.set_stance("force_eager")

    def end(self, owner: object) -> None:
        """Let compiled code be, unless another owner is left."""
        self._end(id(owner))

    def _end(self, owner: int) -> None:
        self._owners.discard(owner)
        # A stance that the user has set meanwhile stays; where it gives way to ours once more, the
        # next spell ends that.
        if not self._owners and self._in_force() and not is_called_from_compiled_code():
            self._stance.__exit__(None, None, None)

    def _in_force(self) -> bool:
        return self._stance is not None and torch._dynamo.eval_frame._stance is self._stance.stance


EAGER_SPELL = EagerSpell()
