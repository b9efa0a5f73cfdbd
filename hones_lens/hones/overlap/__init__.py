"""Across tasks (HONES eq. H6): shared neurons, what masking them costs, what they write."""
