"""The results of the stock architectures as tables."""
from typing import Any
def tables(content: dict[str, Any]) -> str:
    return ""
