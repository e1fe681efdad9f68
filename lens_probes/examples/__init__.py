"""Data for examples and tests: a small real model with prompts, tiny models of many architectures, a toy."""
