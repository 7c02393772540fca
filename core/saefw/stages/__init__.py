"""The built-in stages, found through entry points like anybody's plugin."""
