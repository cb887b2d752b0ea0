"""The command line, `mr-reward`. One file per group of commands."""

from mr_reward.cli.app import main

__all__ = ["main"]
