"""Run folders and what is done in them: the stages of the method, patching, overlap, reproduction."""
