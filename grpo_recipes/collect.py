"""Collect rollouts of a policy, to be labelled and mixed into the training of its reward model.

    python grpo_recipes/collect.py --config grpo_recipes/collect_tiny_handwriting_cpu.yaml
    accelerate launch grpo_recipes/collect.py --config my.yaml --policy outputs/policy --dataset prompts.jsonl

Every field of `CollectArguments` can stand in the YAML file or on the command line. Each process takes a share of the
prompts and holds the whole policy; the result is one file. The same command resumes a run that was interrupted.
`mr-reward label` ranks what is collected.
"""

import logging

from rich.console import Console

from mr_reward.cli.collect import collected_table
from mr_reward.cli.errors import one_error_line
from mr_reward.runs.collect import collect
from mr_reward.runs.recipe import parse_recipe
from mr_reward.worlds.world_policy import WorldCollectArguments

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    with one_error_line():
        (arguments,) = parse_recipe(WorldCollectArguments)
        collected = collect(arguments)
        if collected is not None:
            Console().print(collected_table(collected, arguments.out))
