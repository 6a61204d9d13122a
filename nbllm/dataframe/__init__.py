"""`df.llm` and `series.llm`: the engine from pandas. See `accessor`."""
