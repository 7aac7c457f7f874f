"""Comparisons that print the project's numbers: ``python -m benchmarks.run``; a module here is one comparison or serves them."""
