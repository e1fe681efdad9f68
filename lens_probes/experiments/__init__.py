"""The experiments, one file each: what fits, searches, intervenes or differentiates."""
