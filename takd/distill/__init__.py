"""Losses, methods, frozen teachers with their tables of logits, and evaluation."""
