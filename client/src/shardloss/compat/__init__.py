"""The frameworks' own signatures, over a remote table."""
