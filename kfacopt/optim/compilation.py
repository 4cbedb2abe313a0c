"""`torch.compile`: passes with hooks run uncompiled, all others run their compiled code as it is.

A hook that the compiler meets inside a module is traced: it breaks the graph, and the pieces stay
for the steps without hooks. One that is added after the first compiled call is ignored. Hooks of
the module that is called, however, run before the compiler looks at its forward pass: they keep it
from looking.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch._C._dynamo import eval_frame


def leave_hooks_uncompiled() -> None:
    """Keep the compiler from tracing kfacopt's own code, if there is a compiler in the process."""
    if "torch._dynamo" in sys.modules:
        import torch._dynamo.trace_rules as rules

        rules.add("kfacopt")


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


def parts_uncompiled() -> AbstractContextManager[None]:
    """Return a context in which compiled parts of a model that is not compiled itself run eagerly.

    The compiler would trace the hooks of such parts under the mode that looks for losses, which it
    cannot (a bare `nn.Sequential` fails with a RecursionError).
    """
    if "torch._dynamo" not in sys.modules or is_called_from_compiled_code():
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
