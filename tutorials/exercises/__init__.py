"""Exercises that check themselves: python -m tutorials.exercises.check. README.md lists them."""
