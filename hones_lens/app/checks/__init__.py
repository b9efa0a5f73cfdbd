"""Checks of a checkpoint: parity with Hugging Face, precision."""
