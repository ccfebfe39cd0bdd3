"""Side-by-side measurements. `make bench` runs them all, `make bench ONLY=step` one. Nothing here is a test."""
