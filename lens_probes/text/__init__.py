"""Prompts, the table of their tokens, and the words that tokens belong to."""
