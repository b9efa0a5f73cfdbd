"""Patching: activations of one run put into another, measured or estimated."""
