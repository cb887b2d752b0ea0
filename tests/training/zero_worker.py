"""A rank of test_zero.py: under ZeRO-3, with another seed on every rank, all ranks must train the same model."""

import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import LoraConfig
from test_trainer import arguments, easy_groups
from transformers import AutoModel, AutoTokenizer, set_seed

from mr_reward import MultiResponseRewardModel
from mr_reward.checkpoint.zero3 import outside_zero3, whole_weights
from mr_reward.training.trainer import RewardTrainer


def main(backbone: str, output: str) -> None:
    """Train one step and compare all weights over the ranks."""
    # First: from here on transformers partitions what it loads.
    args = arguments(output, max_steps=1, per_device_train_batch_size=4, use_cpu=False)
    state = PartialState()
    set_seed(state.process_index)
    model = MultiResponseRewardModel.from_backbone(backbone)
    assert not model.get_input_embeddings().weight.numel(), "the backbone was not partitioned"
    with outside_zero3():
        embedding = AutoModel.from_pretrained(backbone).get_input_embeddings().weight
    end_of_turn = AutoTokenizer.from_pretrained(backbone).eos_token_id
    for vector in (model.readouts.summary, model.readouts.comparison):
        torch.testing.assert_close(vector, embedding[end_of_turn], rtol=0, atol=0)
    with whole_weights(model.head):
        drawn = gather_object([model.head.dense.weight.sum().item()])
    assert len(set(drawn)) == state.num_processes == 2, "the seeds are the same, so this test shows nothing"

    trainer = RewardTrainer(model, args, easy_groups(8, 0), peft_config=LoraConfig(r=4))
    trainer.train()
    head = trainer.model.get_base_model().head.modules_to_save.default.dense.weight
    assert not head.numel(), "the head is too small to be partitioned, so this test shows little"
    with whole_weights(trainer.model), torch.no_grad():
        sums = {name: weight.double().abs().sum().item() for name, weight in trainer.model.named_parameters()}
    assert all(sums[name] > 0.0 for name in sums), sums
    ranks = gather_object([sums])
    assert ranks[0] == ranks[1], "the ranks have different weights"
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
