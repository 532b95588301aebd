"""Architectures as data: one file each."""
