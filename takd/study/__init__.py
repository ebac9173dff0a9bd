"""Many runs: plans of distillation paths, running them here or on SLURM, and reports over what runs recorded. Imports
no torch."""
