"""The command line. Nothing below this package knows of it, and torch comes in only where a command needs it."""
