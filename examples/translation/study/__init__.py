"""The study of docs/study.md: its runs, and the page that is made of them."""
