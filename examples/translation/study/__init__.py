"""The study of docs/study.md: its runs, and the page made of them."""
