"""An OpenAI-compatible server over an `LLM` of this process. See `serve`."""
