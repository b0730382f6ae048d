"""Layouts, partition, collectives, strategies and the executor. Knows no time and sets up no network."""
