"""Where weights live while a job runs."""
