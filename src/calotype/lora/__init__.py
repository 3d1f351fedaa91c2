"""LoRA and its kin: files in every spelling, attached to a model from outside and taken away again."""
