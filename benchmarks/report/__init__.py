"""The outputs of a run: tables and pictures."""
