"""Layers that no family owns."""
