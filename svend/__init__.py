"""Svend: train decoder-only reasoning models on a ladder of seven sizes, gated at every rung."""

__version__ = "0.1.0"
