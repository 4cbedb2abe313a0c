"""Refuse parameters, optimizers and models that are shared out over ranks; DDP is in `wrappers`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.nn import Parameter

_WAY_OUT = "Use nn.parallel.DistributedDataParallel, with all parameters on every rank."


def _is_sharded(p: Parameter) -> bool:
    """Tell a DTensor (`fully_shard`, tensor parallelism), or what FSDP keeps in a flat one."""
    return hasattr(p, "placements") or getattr(p, "_fsdp_flattened", False)


def refuse_sharded(params: Iterable[Parameter]) -> None:
    """Raise if a parameter is a shard.

    Args:
        params: The parameters of an optimizer.

    Raises:
        ValueError: If one is.
    """
    if any(_is_sharded(p) for p in params):
        raise ValueError(
            "params: a parameter is sharded (FSDP, DTensor), which KFACOptimizer does not support. "
            + _WAY_OUT
        )


def refuse_shared_optimizer() -> None:
    """Raise if the optimizer is being made for a rank's share of the parameters.

    Raises:
        ValueError: Within `ZeroRedundancyOptimizer`, which keeps no reference that could be found.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.optim.zero_redundancy_optimizer":
            raise ValueError(
                "KFACOptimizer cannot be made by ZeroRedundancyOptimizer: ranks average the "
                "factors of all layers, and there each has layers of its own. Make it from "
                "net.parameters() on every rank; inverses are shared out over the ranks anyway."
            )
        frame = frame.f_back


def refuse_pipeline_stages(modules: Iterable[nn.Module]) -> None:
    """Raise if a module is in a stage of a pipeline.

    Args:
        modules: The modules that contain an optimizer's parameters.

    Raises:
        RuntimeError: If one is, on every rank, as long as all make the optimizer.
    """
    stage = sys.modules.get("torch.distributed.pipelining.stage")
    if stage is None:
        return
    own = {id(module) for module in modules}
    for candidate in gc.get_objects():
        if not issubclass(type(candidate), stage._PipelineStageBase):
            continue
        submodule = getattr(candidate, "submod", None)
        if submodule is not None and any(id(module) in own for module in submodule.modules()):
            raise RuntimeError(
                "KFACOptimizer does not support torch.distributed.pipelining: the loss's curvature "
                "would have to pass through all stages, and only the last one sees the loss. "
                + _WAY_OUT
            )


def refuse_replaced(
    modules: Sequence[tuple[str, nn.Module]], params: Sequence[Parameter], names: Mapping[int, str]
) -> None:
    """Raise if modules were given shards in the place of an optimizer's parameters.

    Where no parameter has a gradient, any other parameter there is refused, as the step would do
    nothing.

    Args:
        modules: The modules that contained the parameters when the optimizer was made.
        params: The optimizer's parameters.
        names: Their names by their `id`.

    Raises:
        RuntimeError: If parameters were replaced.
    """
    known = set(names.values())
    replaced = {
        full: p
        for name, module in modules
        for key, p in module._parameters.items()
        if p is not None
        and id(p) not in names
        and (full := f"{name}.{key}" if name else key) in known
    }
    sharded = [name for name, p in replaced.items() if _is_sharded(p)]
    sharded += [names[id(p)] for p in params if _is_sharded(p)]
    if sharded:
        raise RuntimeError(
            f"{', '.join(sharded)}: sharded after the optimizer was made (FSDP, fully_shard, "
            f"DTensor), which KFACOptimizer does not support. {_WAY_OUT}"
        )
    if any(p.grad is not None for p in params):
        return
    there = {id(p) for _, module in modules for p in module.parameters()}
    gone = [names[id(p)] for p in params if id(p) not in there]
    if modules and gone and len(gone) == len(params):
        raise RuntimeError(
            f"{', '.join(gone)}: no longer in the model, which was given other parameters after "
            "the optimizer was made (by FSDP, or load_state_dict(assign=True), for instance), so "
            "that steps would change nothing. Make the optimizer afterwards."
        )
