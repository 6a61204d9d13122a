"""Widgets for the notebook, one per file."""
