"""Prompts, the table of their tokens, and the word that each token belongs to."""
