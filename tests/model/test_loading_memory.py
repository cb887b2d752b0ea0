"""Weights are in memory once while a checkpoint is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaModel

from mr_reward import MultiResponseRewardModel
from mr_reward.worlds import tiny

# Memory that is not backed by a file: the checkpoint is mapped, and those pages are the system's to drop.
PROGRAM = """
import json, sys, threading, time
from pathlib import Path
import peft, torch
from mr_reward import MultiResponseRewardModel

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

before, peak, done = resident(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = MultiResponseRewardModel.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
done = True
thread.join()
print(json.dumps([peak - before, sum(p.numel() * p.element_size() for p in model.parameters())]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of some 200 MB, and a LoRA checkpoint on its backbone."""
    root = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8
    )
    LlamaModel(config).save_pretrained(root / "backbone")
    tiny.build_tokenizer().save_pretrained(root / "backbone")
    model = MultiResponseRewardModel.from_backbone(root / "backbone")
    model.save_pretrained(root / "whole")
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["head", "readouts"])
    )
    wrapped.save_pretrained(root / "lora")
    model.config.save_pretrained(root / "lora")
    model.processor.save_pretrained(root / "lora")
    return {name: root / name for name in ("whole", "lora")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_the_weights_are_there_once(folders: dict[str, Path], kind: str, dtype: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folders[kind]), dtype]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    peak, weights = json.loads(run.stdout.splitlines()[-1])
    assert peak > 0.9 * weights, "otherwise nothing was measured"
    # Beside the weights: what importing takes, and with LoRA the update of one matrix at a time. Seen: 2 MB, 33 to 77.
    # Weights that are there twice would be 131 MB more, at least.
    assert peak < weights + 110e6, f"{peak / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights"
