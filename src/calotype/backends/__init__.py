"""Other engines than torch for the networks, each behind an extra."""
