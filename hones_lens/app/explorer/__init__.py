"""The explorer: one linked view of a prompt's picture, tokens, heads and neurons, and of edits to them."""
