"""The measured subjects, one file each."""
