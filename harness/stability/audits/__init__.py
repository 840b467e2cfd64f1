"""Audits: what each rank's host can see of a silent error by itself, a file each."""
