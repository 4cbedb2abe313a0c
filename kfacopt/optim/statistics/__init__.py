"""From what was watched to sums of moments; nothing here averages over steps."""
