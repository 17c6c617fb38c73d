"""The instruments: clocks, turns, counts, rows, accuracy, machine.

They know nothing of the measured subjects.
"""
