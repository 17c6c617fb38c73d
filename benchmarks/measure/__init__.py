"""The instruments: clocks, turns, counts, rows, accuracy, machine. Nothing here knows what is measured."""
