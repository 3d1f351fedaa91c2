"""The built-in text-to-image model, rebuilt from nothing: data, training, evaluation, export."""
