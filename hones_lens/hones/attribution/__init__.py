"""From a task to the heads and neurons that carry it (HONES eqs. H1 to H3), and other rankings."""
