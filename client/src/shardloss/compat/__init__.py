"""Losses and samplers over remote tables, with the signatures of other frameworks."""
