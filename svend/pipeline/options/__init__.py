"""What can be set, of which type, and what may be combined with what: the schema."""
