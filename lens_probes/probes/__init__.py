"""The probes, one file each. A new file here is found by `lens_probes.list_probes()` and needs no other edit."""
