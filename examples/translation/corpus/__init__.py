"""Text to train on: where it comes from, how it is cleaned and split, and the prepared folder that holds it."""
