"""What examples and tests run on: a small real model with prompts, tiny models of many architectures, a toy."""
