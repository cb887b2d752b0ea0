"""Test beds with a known truth, and tiny real models for them: for recipes, benchmarks, tests and the command line.

Exports nothing: worlds are no part of the library's interface, and who needs one imports its module.
"""
