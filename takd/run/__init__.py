"""One training run: steps, epochs, checkpoints, records, signals, CUDA graphs and several processes."""
