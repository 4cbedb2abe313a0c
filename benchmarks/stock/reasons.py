"""Why matrices of stock architectures have no curvature."""

from __future__ import annotations

import re

from torch import nn

from benchmarks.stock.architecture import Architecture
from kfacopt.optim.description import DescribedParameter

FROZEN = "AdamW: frozen"
UNKNOWN = "unknown"
NORMALISED = "weight norm, or standardised weights"
ENTRIES = "added or multiplied entry by entry"
TIED = "embedding tied to the head"
EMBEDDING = "embedding, a layer with `layers=` alone"
RECURRENT = "recurrent, a layer with `layers=` alone"
_BY_KIND = {
    "ScaledStdConv2d": NORMALISED,
    "ParametrizedConv1d": NORMALISED,
    "ParametrizationList": NORMALISED,
    "Embedding": EMBEDDING,
    "EmbeddingBag": EMBEDDING,
    **dict.fromkeys(("RNNBase", "RNNCellBase"), RECURRENT),
}
_BY_NAME = {
    r"(^|\.)(cls|mask|distillation)_token$": ENTRIES,
    r"(^|\.)(pos_embed|positions?|position_embeddings|mask_emb|seg_embed)$": ENTRIES,
    r"(^|\.)(att|att_src|att_dst|time_mix_\w+|A_log|temperature|r_\w_bias)$": ENTRIES,
    r"relative_position_bias_table$": ENTRIES,
}


def reason(architecture: Architecture, model: nn.Module, row: DescribedParameter) -> str:
    """Return why a matrix has no curvature, or `UNKNOWN`.

    Args:
        architecture: Whose it is.
        model: Has it.
        row: What the optimizer says of it.
    """
    parts = dict(architecture.why)
    owners = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners[name] = (model.get_submodule(name.rpartition(".")[0]), id(p))
    for pattern, why in _BY_NAME.items():
        if re.search(pattern, row.parameter):
            return why
    for part, why in parts.items():
        if part in row.parameter:
            return why
    module, identity = owners[row.parameter]
    kinds = [base.__name__ for base in type(module).__mro__]
    found = next((_BY_KIND[kind] for kind in kinds if kind in _BY_KIND), UNKNOWN)
    if found == EMBEDDING:
        sharing = [other for other, i in owners.values() if i == identity]
        if any(isinstance(other, nn.Linear) for other in sharing):
            return TIED
    return found
