"""What becomes of a run: tables and pictures."""
