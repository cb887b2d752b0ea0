"""Peak memory and tokens/s of a training step, against the same step with the whole language model.

    python benchmarks/training_step.py                             # a random Llama, nothing downloaded
    python benchmarks/training_step.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Ours runs the backbone only and keeps the last hidden state. The other is the full model called with
`output_hidden_states=True`, as the paper's public code does: logits over the vocabulary are computed, and the hidden
states of all layers kept. Same row (layout `causal`), same LoRA, same head, same optimizer. Every measurement is a
process of its own, the variants take turns; reported are ratios of medians. Memory is what the steps add to the
loaded model: on a GPU torch's own count, on a CPU the peak resident set, reset after loading (Linux). The last line of
stdout is one JSON document.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mr_reward.layouts import plan_row
from mr_reward.losses import pairwise_bradley_terry
from mr_reward.modeling import MultiResponseRewardConfig, MultiResponseRewardModel

VARIANTS = ("ours", "full language model")


class FullModelScorer(nn.Module):
    """The same reward model around the full language model: logits computed, all hidden states kept."""

    def __init__(self, full: PreTrainedModel, ours: MultiResponseRewardModel) -> None:
        super().__init__()
        self.full, self.readouts, self.head = full, ours.readouts, ours.head

    def forward(self, input_ids: Tensor, kinds: Tensor, score_sites: Tensor, **unused: Tensor) -> Tensor:
        """Scores (B, N)."""
        embeddings = self.readouts(self.full.get_input_embeddings()(input_ids), kinds)
        output = self.full(inputs_embeds=embeddings, output_hidden_states=True, use_cache=False)
        rows = torch.arange(len(input_ids), device=input_ids.device)[:, None]
        return self.head(output.hidden_states[-1][rows, score_sites])


def load(options: argparse.Namespace) -> PreTrainedModel:
    """The language model of the measurement."""
    if options.model:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 32,
        num_key_value_heads=options.width // 64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def make_row(options: argparse.Namespace, vocabulary: int) -> dict[str, Tensor]:
    """B equal rows of random tokens."""
    plan = plan_row("causal", options.prompt_tokens, [options.response_tokens] * options.responses)
    size = (options.rows, len(plan.segments))
    return {
        "input_ids": torch.randint(vocabulary, size),
        "segments": plan.segments.expand(size).clone(),
        "kinds": plan.kinds.expand(size).clone(),
        "offsets": plan.offsets.expand(size).clone(),
        "score_sites": torch.tensor([plan.score_sites] * options.rows),
        "response_mask": torch.ones(options.rows, options.responses, dtype=torch.bool),
    }


def measure(variant: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and bytes of some steps in this process."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    full = load(options)
    base = full.base_model
    config = MultiResponseRewardConfig(
        backbone_config=base.config, layout="causal", attn_implementation=base.config._attn_implementation
    )
    ours = MultiResponseRewardModel(config, backbone=base)
    model: nn.Module = ours if variant == "ours" else FullModelScorer(full, ours)
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        modules_to_save=["head", "readouts"],
    )
    model = get_peft_model(model, lora).to(device).train()
    if options.gradient_checkpointing:
        (ours if variant == "ours" else full).gradient_checkpointing_enable()
    inputs = {key: value.to(device) for key, value in make_row(options, base.config.vocab_size).items()}
    rankings = torch.arange(1, options.responses + 1, device=device).expand(options.rows, -1)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)

    def step() -> None:
        scores = model(**inputs)
        scores = scores if isinstance(scores, Tensor) else scores.scores
        pairwise_bradley_terry(scores, rankings, inputs["response_mask"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    before = reset_peak(device)
    step()  # the first one also makes the optimizer's state
    synchronise(device)
    started = time.perf_counter()
    for _ in range(options.steps):
        step()
    synchronise(device)
    seconds = (time.perf_counter() - started) / options.steps
    return {"bytes": peak(device) - before, "tokens_per_second": inputs["input_ids"].numel() / seconds}


def synchronise(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> int:
    """Start counting the peak anew; returns the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: torch.device) -> int:
    """Largest number of bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def resident(name: str) -> int:
    """A line of this process's memory status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the benchmark and of one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a causal language model; default: a random Llama")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--prompt_tokens", type=int, default=256)
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--response_tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of one measurement")
    parser.add_argument("--variant", choices=VARIANTS, help="one measurement in this process")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure every variant in turn, print the ratios."""
    options = parse()
    if options.variant:
        print(json.dumps(measure(options.variant, options)))
        return
    results: dict[str, Any] = {}
    table = Table("gradient checkpointing", "peak memory, full / ours", "tokens/s, ours / full")
    for checkpointing in (False, True):
        found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for _ in range(options.repeats):
            for variant in VARIANTS:
                command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
                command += ["--gradient_checkpointing"] if checkpointing else []
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[variant].append(json.loads(run.stdout.splitlines()[-1]))
        ours, full = (
            {key: statistics.median(run[key] for run in found[variant]) for key in found[variant][0]}
            for variant in VARIANTS
        )
        ratios = {
            "memory_full_over_ours": round(full["bytes"] / ours["bytes"], 2),
            "speed_ours_over_full": round(ours["tokens_per_second"] / full["tokens_per_second"], 2),
        }
        name = "on" if checkpointing else "off"
        results[name] = {**ratios, "runs": found}
        table.add_row(name, *(f"{value:.2f}" for value in ratios.values()))
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
