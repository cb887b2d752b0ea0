"""Test beds with a known truth, and tiny real models for them: for recipes, benchmarks, tests and the command line."""
