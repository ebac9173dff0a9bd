"""Many runs: plans of distillation paths, running them here or on SLURM, and reports on their records. Imports no
torch."""
