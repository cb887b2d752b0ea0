"""Scored groups as an HTML page or a figure, for `mr-reward inspect`: read them, prepare a view of each, render."""
