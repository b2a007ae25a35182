"""Everything that runs inside the worker process, and nothing else."""
