"""Features of a backbone's attention that ours does not have: in the mask, another backend by name, or refused.

What is right is told by the stock model with `eager` attention, which reads a prompt and one response alone.
"""

from __future__ import annotations

import logging
import random
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_models import ROUNDING, VISIBLE_CHANGE, assert_close, pack, random_text, score
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.attention.backends import attention_mask
from mr_reward.attention.reach import Reach
from mr_reward.errors import BackendError, ConfigurationError
from mr_reward.layouts import plan_row, visible
from mr_reward.model import features
from mr_reward.model.configuration import context_tokens
from mr_reward.model.features import _LIMITS
from mr_reward.model.rows import collate
from mr_reward.worlds import tiny

SIZES = {
    "vocab_size": len(tiny.build_tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def backbone(family: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A tiny base model under `eager`, whose every weight matters."""
    sizes = {key: value for key, value in (SIZES | settings).items() if (family, key) != ("falcon", "head_dim")}
    config = CONFIG_MAPPING[family](**sizes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
            else:
                weight.add_(0.2 * torch.randn_like(weight))
    return model


def reward_model(stock: PreTrainedModel, layout: str, **options: Any) -> MultiResponseRewardModel:
    """On a copy of the stock model, as a user would load it."""
    config = type(stock.config).from_dict(stock.config.to_dict())
    # transformers' own default: sdpa, or eager where the family has no sdpa
    own = AutoModel.from_config(config, dtype=torch.float32)
    own.load_state_dict(stock.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return MultiResponseRewardModel.from_backbone(
            own, layout=layout, processor=tiny.build_tokenizer(), **options
        ).eval()


@torch.no_grad()
def alone(model: MultiResponseRewardModel, stock: PreTrainedModel, group: ResponseGroup) -> Tensor:
    """Scores (N,) of the stock model: of each response behind the prompt, or for `causal` of the row up to its end."""
    row = pack(model, group)
    embeds = stock.get_input_embeddings()(row.input_ids[0])
    embeds[row.kinds[0] == 1] = model.readouts.summary
    scores = []
    for i, site in enumerate(row.score_sites[0].tolist(), start=1):
        segments = row.segments[0, : site + 1]
        own = (segments == 0) | (segments == i) | (model.config.layout == "causal")
        hidden = stock(inputs_embeds=embeds[: site + 1][own][None], use_cache=False).last_hidden_state[0, -1]
        scores.append(model.head(hidden[None, None])[0, 0])
    return torch.stack(scores)


def groups(seed: int) -> list[ResponseGroup]:
    """Prompts and responses that are longer and shorter than the limits below."""
    rng = random.Random(seed)
    return [
        ResponseGroup(
            prompt=random_text(rng, prompt, 1),
            responses=list(dict.fromkeys(random_text(rng, longest) for _ in range(n))),
        )
        for prompt, n, longest in ((40, 4, 30), (3, 2, 5), (12, 3, 50))
    ]


def limit(rng: random.Random) -> int:
    return rng.choice([2, 3, 7, 8, 13, 20])


def heads(rng: random.Random) -> dict[str, Any]:
    """Groups of query heads of one to four."""
    count = rng.choice([4, 8])
    return {
        "num_attention_heads": count,
        "num_key_value_heads": rng.choice([2, count // 2, count]),
        "head_dim": rng.choice([8, 16]),
        "hidden_size": 8 * count,
    }


def layers(rng: random.Random, other: str) -> dict[str, Any]:
    return {"layer_types": [other, *rng.choices([other, "full_attention"], k=2), "full_attention"]}


SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2], "mrope_interleaved": True}

# family: settings of a random configuration, the attention that is chosen
FEATURES: dict[str, tuple[Any, str]] = {
    "mistral": (lambda rng: {"sliding_window": limit(rng)}, "sdpa"),
    "phi3": (lambda rng: {"sliding_window": limit(rng)}, "sdpa"),
    "starcoder2": (lambda rng: {"sliding_window": limit(rng)}, "sdpa"),
    "mixtral": (lambda rng: {"sliding_window": limit(rng), **EXPERTS}, "sdpa"),
    "qwen2": (
        lambda rng: {"sliding_window": limit(rng), "use_sliding_window": True, "max_window_layers": rng.randint(0, 3)},
        "sdpa",
    ),
    "gemma3_text": (lambda rng: {"sliding_window": limit(rng), **layers(rng, "sliding_attention")}, "sdpa"),
    "cohere2": (lambda rng: {"sliding_window": limit(rng), **layers(rng, "sliding_attention")}, "sdpa"),  # NoPE
    "gemma2": (
        lambda rng: {
            "sliding_window": limit(rng),
            "attn_logit_softcapping": rng.uniform(0.5, 5),
            **layers(rng, "sliding_attention"),
        },
        "eager",
    ),
    "gpt_oss": (  # sinks
        lambda rng: {"sliding_window": limit(rng), **EXPERTS, **layers(rng, "sliding_attention")},
        "eager",
    ),
    "llama4_text": (
        lambda rng: {
            "attention_chunk_size": limit(rng),
            "no_rope_layers": rng.choices([0, 1], k=4),
            "intermediate_size_mlp": 32,
            "moe_layers": [],
            **layers(rng, "chunked_attention"),
        },
        "sdpa",
    ),
    "smollm3": (lambda rng: {"no_rope_layers": rng.choices([0, 1], k=4)}, "mr_group"),
    "llama": (lambda rng: {"attention_bias": True, "attention_dropout": 0.5}, "mr_group"),
    "deepseek_v3": (  # keys wider than values
        lambda rng: {
            "num_key_value_heads": 4,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "v_head_dim": rng.choice([8, 12]),
            "num_attention_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "first_k_dense_replace": 4,
        },
        "sdpa",
    ),
    "falcon": (lambda rng: {"alibi": False, "num_attention_heads": 4, "num_kv_heads": 4}, "sdpa"),
    "qwen3": (
        lambda rng: {"sliding_window": limit(rng), "use_sliding_window": True, **layers(rng, "sliding_attention")},
        "sdpa",
    ),
    "qwen3_vl_text": (lambda rng: {"head_dim": 16, "rope_parameters": SECTIONS}, "mr_group"),
    "olmo3": (lambda rng: {"sliding_window": limit(rng), **layers(rng, "sliding_attention")}, "sdpa"),
    "exaone4": (lambda rng: {"sliding_window": limit(rng), **layers(rng, "sliding_attention")}, "sdpa"),  # NoPE
    "granite": (
        lambda rng: {
            "attention_multiplier": rng.uniform(0.1, 1),
            "residual_multiplier": rng.uniform(0.2, 1),
            "embedding_multiplier": rng.uniform(1, 4),
        },
        "mr_group",
    ),
    "gemma": (lambda rng: {}, "mr_group"),
    "olmo2": (lambda rng: {"attention_bias": rng.random() < 0.5}, "mr_group"),
    "glm4": (lambda rng: {"partial_rotary_factor": 0.5, "attention_bias": True}, "mr_group"),
    "phi": (lambda rng: {"partial_rotary_factor": 0.5, "qk_layernorm": rng.random() < 0.5}, "mr_group"),
    "gpt2": (lambda rng: {"n_embd": 32, "n_layer": 3, "n_head": 4, "hidden_size": 32}, "mr_group"),
    "stablelm": (lambda rng: {}, "sdpa"),  # its layers do not hand on what the backbone is given
}


@pytest.mark.parametrize("layout", ["causal", "isolated"])
@pytest.mark.parametrize("family", FEATURES)
def test_a_random_configuration_equals_eager(family: str, layout: str) -> None:
    settings, expected = FEATURES[family]
    for seed in range(2):
        rng = random.Random(seed)
        stock = backbone(family, seed, **(heads(rng) | settings(rng)))
        model = reward_model(stock, layout)
        assert model.attention_for() == expected, stock.config
        batch = groups(seed)
        own = [alone(model, stock, group) for group in batch]
        for padding_side in ("left", "right"):
            for found, one in zip(score(model, batch, padding_side), own, strict=True):
                torch.testing.assert_close(found, one, rtol=0, atol=10 * ROUNDING)
        assert max(float(one.max() - one.min()) for one in own) > 100 * ROUNDING
        for found, one in zip(GroupScorer(model).score(batch), own, strict=True):
            torch.testing.assert_close(torch.tensor(found), one, rtol=0, atol=10 * ROUNDING)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("layout", ["causal", "isolated", "set"])
def test_backends_agree_on_windows(layout: str, backend: str) -> None:
    stock = backbone("gemma3_text", sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2)
    batch = groups(4)
    expected = score(reward_model(stock, layout, attn_implementation="eager"), batch)
    model = reward_model(stock, layout, attn_implementation=backend)
    with torch.compiler.set_stance("force_eager") if backend == "flex_attention" else nullcontext():
        for found, one in zip(score(model, batch, "left"), expected, strict=True):
            torch.testing.assert_close(found, one, rtol=0, atol=10 * ROUNDING)


def test_set_compares_beyond_a_window_and_does_not_know_the_order() -> None:
    model = reward_model(backbone("mistral", sliding_window=4), "set")
    group = ResponseGroup(prompt="Which one?", responses=["a" * 30, "b", "c" * 12])
    (found,) = score(model, [group])
    (turned,) = score(model, [group.select([2, 0, 1])])
    torch.testing.assert_close(found[[2, 0, 1]], turned, rtol=0, atol=ROUNDING)
    (other,) = score(model, [ResponseGroup(prompt="Which one?", responses=["a" * 30, "B", "c" * 12])])
    assert (found - other)[[0, 2]].abs().min() > VISIBLE_CHANGE


def test_a_window_is_counted_as_if_the_response_stood_alone() -> None:
    """The second response is as near to the prompt as the first."""
    plan = plan_row("set", 3, [2, 2])
    segments, kinds = plan.segments[None], plan.kinds[None]
    places = torch.tensor([[0, 1, 2, *range(3, 7), *range(3, 7)]])
    reaches = {"full_attention": Reach(), "sliding_attention": Reach(window=3), "chunked_attention": Reach(chunk=4)}
    masks = attention_mask("set", "sdpa", segments, kinds, torch.float32, None, places, reaches)
    assert torch.equal(masks["full_attention"][:, 0], visible("set", segments, kinds))
    #                                                               P        r s c      r s c
    assert masks["sliding_attention"][0, 0, 7].int().tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    assert masks["chunked_attention"][0, 0, 7].int().tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    assert masks["chunked_attention"][0, 0, 8].int().tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    comparison = [0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1]  # sees both summaries
    assert masks["sliding_attention"][0, 0, 10].int().tolist() == comparison


def test_the_fallback_is_told_by_name(caplog: pytest.LogCaptureFixture) -> None:
    stock = backbone("mistral", sliding_window=16)
    with caplog.at_level(logging.WARNING, logger="mr_reward"):
        model = reward_model(stock, "set")
    assert caplog.messages == [
        "attention of MistralModel: 'sdpa'; 'mr_group' does not have the backbone's sliding_window=16"
    ]
    assert model.attention_for() == "sdpa" and not model.reads_flat()
    with pytest.raises(
        BackendError, match="'mr_group' does not have the backbone's sliding_window=16.*another attn_im"
    ):
        reward_model(stock, "set", attn_implementation="mr_group")
    model.backbone.set_attn_implementation("mr_group")  # behind our back
    with pytest.raises(BackendError, match="'mr_group' cannot express the backbone's sliding_window=16.*'sdpa'"):
        score(model, groups(0))


PER_LAYER = {
    "vocab_size_per_layer_input": SIZES["vocab_size"],
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
}


@pytest.mark.parametrize(
    ("family", "layout", "settings", "named"),
    [
        ("bloom", "isolated", {"n_head": 4, "n_layer": 2}, "eager"),  # alibi
        ("bert", "causal", {}, "differs from the stock model"),  # sees what comes after
        (
            "gpt_neo",
            "isolated",
            {"attention_types": [[["global", "local"], 2]], "window_size": 4},
            "attention_types=.*local",
        ),
        (
            "jamba",
            "isolated",
            {"mamba_d_state": 4, **EXPERTS},
            "layers of type linear_attention, which layout 'isolated' cannot isolate",
        ),
        ("roberta", "set", {"pad_token_id": 1}, "differs from the stock model"),
        ("roformer", "causal", {}, "differs from the stock model"),
        ("gemma3n_text", "causal", {**PER_LAYER, "laurel_rank": 4}, "reads token ids besides.*per_layer_input=8"),
        (
            "gemma4_text",
            "isolated",
            {**PER_LAYER, "global_head_dim": 16},
            "does not read embeddings in place of token ids.*per_layer_input=8",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused(family: str, layout: str, settings: dict[str, Any], named: str) -> None:
    stock = backbone(family, **settings)
    with pytest.raises(BackendError, match=f"{named}.*another backbone|{named}; use layout='causal'"):
        MultiResponseRewardModel.from_backbone(stock, layout=layout, processor=tiny.build_tokenizer())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 2]], "window_size": 4}),
    ],
)
def test_what_responses_cannot_be_kept_apart_in_is_read_as_one_row(family: str, settings: dict[str, Any]) -> None:
    """As the refusal advises."""
    stock = backbone(family, **settings)
    model = reward_model(stock, "causal")
    for group in groups(2):
        assert_close(score(model, [group])[0], alone(model, stock, group), 10 * ROUNDING)


def test_narrow_embeddings_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="OPTModel has embeddings of width 16 and layers of width 32"):
        reward_model(backbone("opt", ffn_dim=32, word_embed_proj_dim=16), "set")


def test_soft_caps_are_not_lost_in_sdpa() -> None:
    stock = backbone("gemma2", attn_logit_softcapping=2.0)
    with pytest.raises(BackendError, match="'sdpa' does not run.*attn_logit_softcapping=2.0"):
        MultiResponseRewardModel.from_backbone(
            stock, layout="set", processor=tiny.build_tokenizer(), attn_implementation="sdpa"
        )


def test_what_runs_on_a_gpu_only_is_not_refused() -> None:
    config = reward_model(backbone("gpt_oss", **EXPERTS), "set").config
    for backend in ("flex_attention", "flash_attention_2"):  # sinks
        assert features.why_not(MultiResponseRewardModel, config, backend) is None
        config.backbone_config = backbone("gemma3n_text", **PER_LAYER, laurel_rank=4).config
        reason = features.why_not(MultiResponseRewardModel, config, backend)
        assert reason and "reads token ids besides" in reason
        config.backbone_config = backbone("gpt_oss", **EXPERTS).config


def test_attention_dropout_is_trained_with() -> None:
    model = reward_model(backbone("llama", attention_dropout=0.5), "set")
    assert model.attention_for(training=False) == "mr_group" and model.attention_for(training=True) == "sdpa"
    rows = collate([pack(model, group) for group in groups(1)], model.adapter)
    model.train()
    first, second = (model(rows).scores for _ in range(2))
    assert (first - second).abs().max() > VISIBLE_CHANGE
    first.sum().backward()


def test_every_limit_of_the_installed_families_is_known() -> None:
    """The copy that is tried is small only if its limits are: a new name has to be looked at."""
    looks_like_one = re.compile(r"window|chunk|local_att|topk|block_size|interval|stride|span")
    harmless = re.compile(
        r"^(mtp_|mamba_|vision|audio|moe_|max_window_layers)|use_sliding|_pattern$|(index|gated?|scoring)_?topk_blocks"
        r"|^(index_topk_blocks|index_block_size|norm_topk_prob|topk_(group|method|prob)|layer_interval|block_size)$"
        r"|chunk_size|chunkwise|inference_chunk|(lsh|local)_attn_chunk|chunks_(before|after)|_interval$"
        r"|local_attention_(probs|window_len)"
    )
    unknown = set()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        names = {name for cls in CONFIG_MAPPING[family].__mro__ for name in getattr(cls, "__annotations__", {})}
        unknown |= {name for name in names if looks_like_one.search(name)}
    assert not {name for name in unknown if not _LIMITS.search(name) and not harmless.search(name)}


def test_long_rope_ends_at_the_original_context() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    config = CONFIG_MAPPING["phi3"](
        **SIZES, rope_parameters=rope, max_position_embeddings=4096, original_max_position_embeddings=64
    )
    assert context_tokens(config) == 64
    config = CONFIG_MAPPING["mistral"](**SIZES, sliding_window=16, max_position_embeddings=4096)
    assert context_tokens(config) == 4096
    # A rope for each type of layer: the shortest counts.
    config.rope_parameters = {
        "full_attention": {**rope, "original_max_position_embeddings": 512},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert context_tokens(config) == 512
