"""Checks and measurements that are made every so many steps, a file each."""
