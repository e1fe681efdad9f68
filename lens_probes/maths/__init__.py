"""Mathematics without models: the vocabulary in chunks, similarities, tests and intervals."""
