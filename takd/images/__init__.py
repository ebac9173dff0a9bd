"""Labelled images: splits, seeded batches, augmentation, and readers of files."""
