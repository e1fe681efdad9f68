"""The probes, one file each. `lens_probes.list_probes()` finds a new file here; no other edit is needed."""
