"""Exact passes over the live table, in slices."""
