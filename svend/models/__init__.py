"""Architecture only: no files, no tracking."""
