"""The figures of arXiv 1312.6114 once more, on MNIST and Frey Face: ``python -m benchmarks.paper figure2``."""
