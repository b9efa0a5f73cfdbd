"""Steering: scale the selected neurons, by factors that are learned or set (HONES eq. H5)."""
