"""One folder per question; ``python -m benchmarks`` lists and runs them."""
