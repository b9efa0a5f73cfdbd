"""The commands of `hones`, a module each: `add` declares options, `run` does it and imports what is heavy."""
