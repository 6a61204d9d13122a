"""Grammar-constrained decoding: which tokens may follow, from llguidance."""
