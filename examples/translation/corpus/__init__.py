"""Training text: its sources, its cleaning and splitting, and the prepared folder that holds it."""
