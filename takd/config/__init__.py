"""Settings: names, recipes, method options, flags, and the configuration of a run. Imports no torch."""
