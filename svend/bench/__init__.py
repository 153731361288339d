"""Benchmarks by command, side by side with what users would pick instead."""
