"""The run of `make gpu`: its command, its jobs, its programs, its report."""
