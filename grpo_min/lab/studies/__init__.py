"""The studies whose results are in tutorials/results: a file for each question."""
