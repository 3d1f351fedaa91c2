"""Checkpoints: files of tensors, the layouts they come in, and which part of which model they hold."""
