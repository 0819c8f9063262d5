"""The owner of rows: plain classes that a worker hosts."""
