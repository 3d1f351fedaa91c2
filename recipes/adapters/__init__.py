"""Recipes that train adapters of the built-in model: a style LoRA and a ControlNet."""
