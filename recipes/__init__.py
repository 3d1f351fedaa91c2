"""Recipes that make what Calotype ships."""
