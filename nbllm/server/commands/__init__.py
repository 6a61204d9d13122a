"""The commands `nbllm serve`, `chat`, `complete` and `run-batch`."""
