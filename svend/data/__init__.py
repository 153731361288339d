"""From sources to packed batches of tokens, always the same for a seed, resumable anywhere."""
