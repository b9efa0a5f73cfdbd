"""The commands of `hones`, one module each: `add` declares options, `execute` runs the command."""
