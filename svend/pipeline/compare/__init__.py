"""Runs and ladders held beside one another: one report."""
