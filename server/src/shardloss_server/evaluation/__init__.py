"""Exact evaluation passes over a live table, slice by slice."""
