"""The rows of a batch go the way of tensors: pinned, moved by accelerate, counted, sent by a worker process."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from mr_reward.model.rows import Rows, collate
from tests.tiny_models import pack, random_group, reward_model


def batch() -> dict[str, Any]:
    model = reward_model("qwen3_vl", "set")
    rows = [pack(model, random_group(random.Random(seed), 3, images=1)) for seed in range(2)]
    return {"rankings": torch.zeros(2, 3), "rows": collate(rows, model.adapter)}


def test_accelerate_moves_the_rows() -> None:
    moved = send_to_device(batch(), torch.device("meta"), non_blocking=True)
    rows = moved["rows"]
    assert isinstance(rows, Rows) and rows.device.type == "meta"
    assert {tensor.device.type for tensor in (rows.response_mask, rows.score_sites, *rows.media.values())} == {"meta"}
    assert rows.spans == batch()["rows"].spans


def test_rows_survive_a_worker_process() -> None:
    expected = batch()["rows"]
    loader = DataLoader([0, 1], batch_size=2, collate_fn=lambda _: batch(), num_workers=1)
    (found,) = loader
    assert torch.equal(found["rows"].input_ids, expected.input_ids)
    assert found["rows"].media.keys() == expected.media.keys()


def test_rows_count_their_tokens() -> None:
    rows = batch()["rows"]
    assert rows.num_tokens == rows.segments.numel()


@pytest.mark.gpu
def test_pinned_rows_go_to_the_gpu() -> None:
    rows = batch()["rows"].pin_memory()
    assert rows.input_ids.is_pinned() and rows.to("cuda", non_blocking=True).device.type == "cuda"
