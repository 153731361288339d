"""Versions of the registry, moved from level to level with evidence."""
