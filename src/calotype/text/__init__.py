"""Text encoders and tokenizers: from a prompt to tensors."""
