"""The report: one HTML page, and the same in the terminal."""
