"""Many workers: units of a stage done by processes here, by Ray's actors or by Slurm's jobs."""
