"""The experiments, one file each: they fit, search, intervene or differentiate."""
