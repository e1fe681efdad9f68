"""Mathematics that knows no model: the vocabulary in chunks, similarities, tests and intervals."""
