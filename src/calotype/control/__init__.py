"""Control: pictures that lead a ControlNet."""
