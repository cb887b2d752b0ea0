"""Ways to score the responses of a prompt that the speed benchmarks compare.

    isolated, set     ours, with the attention that the model chooses itself
    set, dense mask   ours, with `attn_implementation="sdpa"`: all pairs of a row are computed
    separate          each response behind a copy of its prompt, one padded batch
    shared cache      the prompt once with its keys and values kept and repeated, then the responses, one padded batch
    full LM           the usual packed implementation: layout `causal`, logits and all hidden states of the full model
    TRL classifier    a sequence classifier over prompt and completion, as `GRPOTrainer` calls a reward model
    bare backbone     a forward pass over one causal row as long as that of `isolated`; it scores nothing

`separate` and `shared cache` give the scores of `isolated`. All but the classifier read the score at a readout vector
with the same head.

Legend: P tokens of the prompt, N responses, G groups, L tokens of a row, H width.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from speed_cells import Cell, Shared, Work, draw_groups, triangle, visible_pairs
from speed_harness import DTYPES
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DynamicCache

from mr_reward.attention.backends import choose_attention
from mr_reward.backbones import BackboneAdapter, get_adapter
from mr_reward.layouts import PADDING_SEGMENT
from mr_reward.model.model import MultiResponseRewardConfig, MultiResponseRewardModel
from mr_reward.model.rows import Rows, build_row, collate
from mr_reward.templates.rendering import RenderedGroup


def our_scorer(shared: Shared, layout: str, attention: str | None) -> MultiResponseRewardModel:
    """The reward model around the shared weights, as `from_backbone` makes it."""
    choose_attention(shared.backbone, "sdpa")
    config = MultiResponseRewardConfig(
        backbone_config=shared.backbone.config, layout=layout, attn_implementation="sdpa"
    )
    model = MultiResponseRewardModel(config, backbone=shared.backbone)
    model.readouts, model.head = shared.readouts, shared.head
    choose_attention(shared.backbone, attention)
    return model.eval()


def packed(rows: Sequence[Rows], adapter: BackboneAdapter, device: torch.device) -> Rows:
    """Rows as one batch on a device."""
    return collate(rows, adapter).to(device)


class Competitor:
    """A way to score groups."""

    name = ""
    attention: str | None = "sdpa"
    work: Work

    def __init__(self, shared: Shared, groups: Sequence[RenderedGroup]) -> None:
        self.shared, self.groups = shared, list(groups)
        self.device = shared.full.device
        self.adapter = get_adapter(shared.backbone.config)

    def prepare(self) -> None:
        """Before each run; not timed. The backbone is shared and holds the choice of the attention."""
        choose_attention(self.shared.backbone, "sdpa")
        choose_attention(self.shared.backbone, self.attention)

    @property
    def computed_flops(self) -> float:
        """Of a forward pass, padding included."""
        return self.work.computed_flops(self.shared.full.config)

    def scores(self) -> Tensor:
        """What is timed: (G, N) scores."""
        raise NotImplementedError

    def _embed(self, input_ids: Tensor, kinds: Tensor) -> Tensor:
        """Token embeddings with the readout vectors at their sites."""
        return self.shared.readouts(self.shared.backbone.get_input_embeddings()(input_ids), kinds)

    def _read(self, rows: Rows) -> dict[str, Tensor]:
        """Arguments of the backbone for whole rows that are padded on the right."""
        ids, media = rows.input_ids, rows.media
        return {
            "inputs_embeds": self._embed(ids, rows.kinds),
            "position_ids": self.adapter.position_ids(self.shared.backbone, ids, rows.segments, rows.offsets, media),
            # Nobody sees what comes later, so padding on the right needs no mask: the fast causal kernels are used.
            "attention_mask": torch.ones_like(ids),
            **self.adapter.forward_arguments(self.shared.backbone, ids, media),
        }

    def _head(self, hidden: Tensor, sites: Tensor) -> Tensor:
        """Hidden states (B, L, H) and sites (B, n) -> (G, N) scores."""
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        return self.shared.head(hidden[rows, sites]).view(len(self.groups), -1)

    def _alone(self) -> list[Rows]:
        """A row for each response of each group."""
        return [
            build_row(group.select([i]), "isolated") for group in self.groups for i in range(len(group.response_ids))
        ]


class Ours(Competitor):
    """The reward model of this package."""

    def __init__(
        self, shared: Shared, groups: Sequence[RenderedGroup], layout: str, attention: str | None = None
    ) -> None:
        super().__init__(shared, groups)
        self.name = layout if attention is None else f"{layout}, dense mask"
        self.attention = attention
        self.model = our_scorer(shared, layout, attention)
        rows = [build_row(group, layout) for group in self.groups]
        self.inputs = packed(rows, self.adapter, self.device)
        tokens, pairs = sum(row.num_tokens for row in rows), sum(visible_pairs(group, layout) for group in self.groups)
        padded = self.inputs.input_ids.numel()
        self.work = Work(tokens=tokens, pairs=pairs, computed_tokens=tokens, computed_pairs=pairs)
        if not self.model.reads_flat():
            dense = padded * self.inputs.input_ids.shape[1]
            self.work = Work(tokens=tokens, pairs=pairs, computed_tokens=padded, computed_pairs=dense)

    def scores(self) -> Tensor:
        """(G, N) scores."""
        return self.model(self.inputs).scores


class Separate(Competitor):
    """N passes over the prompt, in one batch."""

    name = "separate"

    def __init__(self, shared: Shared, groups: Sequence[RenderedGroup]) -> None:
        super().__init__(shared, groups)
        rows = self._alone()
        self.inputs = packed(rows, self.adapter, self.device)
        count, longest = self.inputs.input_ids.shape
        self.work = Work(
            tokens=sum(row.num_tokens for row in rows),
            pairs=sum(triangle(row.num_tokens) for row in rows),
            computed_tokens=count * longest,
            computed_pairs=count * triangle(longest),
        )

    def scores(self) -> Tensor:
        """(G, N) scores."""
        hidden = self.shared.backbone(**self._read(self.inputs), use_cache=False).last_hidden_state
        return self._head(hidden, self.inputs.score_sites)


class SharedCache(Competitor):
    """The prompt is read once, and its keys and values are repeated for the responses."""

    name = "shared cache"

    def __init__(self, shared: Shared, groups: Sequence[RenderedGroup]) -> None:
        super().__init__(shared, groups)
        # All prompts of a cell have one length, so they are a batch without padding.
        prompt = len(groups[0].prompt_ids)
        self.repeats = len(groups[0].response_ids)
        self.prompts = packed([build_row(group.select([]), "isolated") for group in groups], self.adapter, self.device)
        rows = self._alone()
        whole = packed(rows, self.adapter, self.device)
        self.responses = {key: getattr(whole, key)[:, prompt:] for key in ("input_ids", "kinds", "offsets")}
        self.sites = whole.score_sites - prompt
        count, longest = self.responses["input_ids"].shape
        self.work = Work(
            tokens=len(groups) * prompt + sum(row.num_tokens - prompt for row in rows),
            pairs=sum(visible_pairs(group, "isolated") for group in groups),
            computed_tokens=len(groups) * prompt + count * longest,
            computed_pairs=len(groups) * triangle(prompt) + count * longest * (prompt + longest),
        )

    def scores(self) -> Tensor:
        """(G, N) scores."""
        arguments, cache = self._read(self.prompts), DynamicCache(config=self.shared.backbone.config)
        self.shared.backbone(**arguments, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(self.repeats)
        # Each response continues from the largest position of its prompt on any axis: an image has three.
        positions = arguments["position_ids"]
        axes = tuple(axis for axis in range(positions.ndim) if axis != positions.ndim - 2)
        following = positions.amax(axes).repeat_interleave(self.repeats)[:, None] + 1 + self.responses["offsets"]
        hidden = self.shared.backbone(
            inputs_embeds=self._embed(self.responses["input_ids"], self.responses["kinds"]),
            position_ids=following.expand(*positions.shape[:-2], *following.shape),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self._head(hidden, self.sites)


class FullModel(Competitor):
    """What packed rows usually cost: the language model's head runs over every token, every layer's output is kept."""

    name = "full LM"

    def __init__(self, shared: Shared, groups: Sequence[RenderedGroup]) -> None:
        super().__init__(shared, groups)
        rows = [build_row(group, "causal") for group in self.groups]
        self.inputs = packed(rows, self.adapter, self.device)
        count, longest = self.inputs.input_ids.shape
        self.work = Work(
            tokens=sum(row.num_tokens for row in rows),
            pairs=sum(visible_pairs(group, "causal") for group in self.groups),
            computed_tokens=count * longest,
            computed_pairs=count * triangle(longest),
            head_tokens=count * longest,
        )

    def scores(self) -> Tensor:
        """(G, N) scores."""
        output = self.shared.full(
            inputs_embeds=self._embed(self.inputs.input_ids, self.inputs.kinds),
            attention_mask=(self.inputs.segments != PADDING_SEGMENT).long(),
            output_hidden_states=True,
            use_cache=False,
        )
        return self._head(output.hidden_states[-1], self.inputs.score_sites)


class Classifier(Competitor):
    """What `GRPOTrainer` does with a reward model: texts are padded on the right, `use_cache` is not turned off."""

    name = "TRL classifier"

    def __init__(self, shared: Shared, groups: Sequence[RenderedGroup]) -> None:
        super().__init__(shared, groups)
        config = copy.deepcopy(shared.backbone.config)
        config.num_labels = 1
        with torch.device("meta"):  # a backbone of its own is never made
            self.model = AutoModelForSequenceClassification.from_config(config)
        self.model.model = shared.backbone
        self.model.eval()
        width = config.hidden_size
        self.model.score = nn.Linear(width, 1, bias=False, device=self.device, dtype=shared.full.dtype)
        texts = [
            torch.cat([group.prompt_ids, torch.tensor(ids)]) for group in self.groups for ids in group.response_ids
        ]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=config.pad_token_id)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        self.inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        count, longest = ids.shape
        # With padding, the mask is a dense one.
        pairs = triangle(longest) if bool(mask.all()) else longest * longest
        self.work = Work(
            tokens=sum(map(len, texts)),
            pairs=sum(triangle(len(text)) for text in texts),
            computed_tokens=count * longest,
            computed_pairs=count * pairs,
        )

    def scores(self) -> Tensor:
        """(G, N) scores."""
        return self.model(**self.inputs).logits.view(len(self.groups), -1)


class Bare(Competitor):
    """The backbone alone on one causal row as long as that of `isolated`."""

    name = "bare backbone"

    def __init__(self, shared: Shared, groups: Sequence[RenderedGroup]) -> None:
        super().__init__(shared, groups)
        self.ids = torch.cat([build_row(group, "isolated").input_ids[0] for group in groups])[None].to(self.device)
        length = self.ids.shape[1]
        pairs = triangle(length)
        self.work = Work(tokens=length, pairs=pairs, computed_tokens=length, computed_pairs=pairs)

    def scores(self) -> Tensor:
        """Nothing is scored; the last hidden states."""
        return self.shared.backbone(input_ids=self.ids, use_cache=False).last_hidden_state


REFERENCES = ("isolated", "set")
"""Ours: what the others are compared with."""

_MAKERS = {
    "isolated": lambda shared, groups: Ours(shared, groups, "isolated"),
    "set": lambda shared, groups: Ours(shared, groups, "set"),
    "set, dense mask": lambda shared, groups: Ours(shared, groups, "set", "sdpa"),
    SharedCache.name: SharedCache,
    FullModel.name: FullModel,
    Separate.name: Separate,
    Classifier.name: Classifier,
    Bare.name: Bare,
}


def make_competitor(name: str, shared: Shared, groups: Sequence[RenderedGroup]) -> Competitor:
    """Make a competitor by its name."""
    return _MAKERS[name](shared, groups)


def build(
    cell: Cell,
    names: Sequence[str],
    options: argparse.Namespace,
    change: Callable[[Shared], None] | None = None,
) -> dict[str, Competitor]:
    """Competitors that share weights, which `change` prepares, and tokens."""
    shared = Shared.make(cell, torch.device(options.device), DTYPES[options.dtype], options.seed)
    groups = draw_groups(cell, shared.full.config, ragged=options.lengths == "ragged", seed=options.seed)
    if change is not None:
        change(shared)
    return {name: make_competitor(name, shared, groups) for name in names}


# Whose scores have to be the same.
_SAME = (("isolated", Separate.name), ("isolated", SharedCache.name), ("set", "set, dense mask"))
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def check_scores(found: dict[str, Tensor], dtype: torch.dtype, tolerance: float | None = None) -> dict[str, float]:
    """Refuse to time what gives other scores."""
    tolerance = _TOLERANCES[dtype] if tolerance is None else tolerance
    differences = {}
    for one, other in _SAME:
        if one in found and other in found:
            difference = float((found[one] - found[other]).abs().max())
            if not difference <= tolerance:
                raise RuntimeError(
                    f"the results of {one!r} and {other!r} differ by {difference:.1e}, expected at most "
                    f"{tolerance:.0e} in {dtype}; nothing was timed"
                )
            differences[f"{one} - {other}"] = difference
    return differences
