"""Things to run: the demo, and specs to start from."""
