"""Hooked building blocks: one idea a file, plain arguments instead of config objects."""
