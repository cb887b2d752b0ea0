"""What makes a checkpoint folder whole: configuration keys, weights, backbone, processor; and the digest of a model.

A load refuses what it cannot vouch for. `name` is a folder or a hub id, `revision` one of the hub repository.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from mr_reward.checkpoint.checksums import CHECKSUM_FILE, changed_file, listed_files
from mr_reward.errors import CheckpointError, MRRewardError
from mr_reward.hub import why_missing

logger = logging.getLogger(__name__)

# Written by transformers and its Trainer beside the configuration's own fields. None of them changes a score: the
# model passes use_cache=False itself.
_BOOKKEEPING_KEYS = {"architectures", "auto_map", "dtype", "model_type", "transformers_version", "use_cache"}

# What transformers, tokenizers and peft raise for files that are damaged: they check little before they use it.
_READER_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
    AssertionError,
)

# Besides the weights, what decides the scores.
_SCORING_KEYS = ("layout", "template", "template_hash", "score_scale", "head_activation", "head_bias")
_CHUNK = 1 << 22  # 64-bit words: each temporary copy takes 32 MB


class reading(AbstractContextManager[Any]):  # used as a verb, like `contextlib.suppress`
    """A block that reads a checkpoint: what a damaged file makes the readers raise becomes a `CheckpointError`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Translate; our own errors, Ctrl-C, missing packages and a full GPU pass through."""
        if exc is None or isinstance(exc, MRRewardError | torch.OutOfMemoryError):
            return
        # The Rust libraries raise plain `Exception`s, and panics that are no exceptions.
        from_rust = type(exc) is Exception or type(exc).__name__ == "PanicException"
        if from_rust or isinstance(exc, _READER_ERRORS):
            raise CheckpointError(
                f"{self._name}: could not be loaded ({type(exc).__name__}: {str(exc)[:500]}). If the options are "
                "right, a file in it is damaged; copy it again"
            ) from exc


def check_there(name: str, revision: str | None = None, **options: Any) -> None:
    """Refuse at once what is neither a folder nor a hub id that answers; `options` of `why_missing`."""
    reason = why_missing(name, revision=revision, **options)
    if reason is not None:
        raise CheckpointError(f"{name} {reason}")


def check_checksums(name: str, revision: str | None = None, *, verify: bool = False) -> None:
    """Refuse a checkpoint with a file that is not the one that was saved, so far as `changed_file` can tell.

    Half a file, and a file of another run, would otherwise only show as other scores.
    """
    path = find_file(name, CHECKSUM_FILE, revision)
    if path is None:
        return
    if not Path(name).is_dir():  # of a hub repository only files that were asked for are on this machine
        with reading(name):
            for file in listed_files(path.parent):
                find_file(name, file, revision)
    changed = changed_file(path.parent, verify=verify)
    if changed is not None:
        raise CheckpointError(
            f"{name}: {changed} is missing or not the file that was saved (by {CHECKSUM_FILE}), so scores would not "
            f"be this model's; copy the folder again, or, if you changed it on purpose, delete {CHECKSUM_FILE}"
        )


def check_shards(name: str, revision: str | None = None) -> set[str]:
    """The files of the weights; an index that looks for some outside of the checkpoint is refused."""
    path = find_file(name, SAFE_WEIGHTS_INDEX_NAME, revision)
    if path is None:
        return {SAFE_WEIGHTS_NAME}
    with reading(name):
        files = set(json.loads(path.read_text())["weight_map"].values())
        outside = sorted(file for file in files if Path(file).name != file)
    if outside:
        raise CheckpointError(
            f"{name}: {SAFE_WEIGHTS_INDEX_NAME} looks for weights in {outside[0]!r}, expected files of the folder "
            "itself; get the checkpoint from its source again"
        )
    return files


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of a model in one file or in shards, read off the headers.

    Opening a file compares its header with its size: CheckpointError if one is missing, cut off or of another format.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder / file for file in check_shards(str(folder))):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the whole folder")
        try:
            with safe_open(path, "pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        except SafetensorError as error:
            raise CheckpointError(f"{path} is cut off or no safetensors file ({error}); copy it again") from error
    return shapes


def check_config_keys(name: str, revision: str | None, config_class: type[PreTrainedConfig]) -> None:
    """Refuse a configuration of another model or with keys that this release does not know."""
    try:
        found, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except OSError as error:
        raise CheckpointError(f"{name}: no config.json could be read ({error})") from error
    if not found:  # a folder without the file is no error to transformers
        raise CheckpointError(f"{name}: no config.json there; pass a folder written by save_pretrained")
    if found.get("model_type") != config_class.model_type:
        raise CheckpointError(
            f"{name}: holds a {found.get('model_type')!r} model, expected {config_class.model_type!r}; "
            "turn a plain backbone into a reward model with MultiResponseRewardModel.from_backbone"
        )
    default = config_class()
    unknown = set(found) - set(default.to_dict()) - _BOOKKEEPING_KEYS - {"_commit_hash"}
    if unknown:
        raise CheckpointError(
            f"{name}: unknown configuration keys {sorted(unknown)}; they may change how the model scores. "
            "Load it with the release of mr_reward that wrote it, or remove them"
        )
    if found.get("schema_version", 0) > default.schema_version:
        raise CheckpointError(
            f"{name}: schema version {found['schema_version']}, this release reads up to {default.schema_version}; "
            "upgrade mr_reward"
        )


def check_loading_info(
    name: str, info: Mapping[str, Any], advice: str = "save it again with save_pretrained from the trained model"
) -> None:
    """Refuse weights that do not fit the model exactly; a random head scores as confidently as a trained one."""
    problems = [
        f"{problem} {sorted(str(key) for key in info[kind])}"
        for kind, problem in (
            ("missing_keys", "missing weights"),
            ("unexpected_keys", "unexpected weights"),
            ("mismatched_keys", "weights of another shape"),
            ("error_msgs", "errors"),
        )
        if info.get(kind)
    ]
    if problems:
        raise CheckpointError(f"{name}: {'; '.join(problems)}. A reward model must be complete; {advice}")


def check_shapes(name: str, found: Mapping[str, Sequence[int]], model: Mapping[str, Tensor], **advice: str) -> None:
    """The same for weights that are not loaded: `found` is name -> shape, `model` what takes them."""
    expected = {key: tuple(tensor.shape) for key, tensor in model.items()}
    info = {
        "missing_keys": expected.keys() - found.keys(),
        "unexpected_keys": found.keys() - expected.keys(),
        "mismatched_keys": [key for key in expected.keys() & found.keys() if expected[key] != found[key]],
    }
    check_loading_info(name, info, **advice)


def check_template_hash(name: str, trained_with: str | None, found: str) -> None:
    """Refuse a processor or release that turns groups into other text than at training time."""
    if found != trained_with:
        raise CheckpointError(
            f"{name}: trained with template hash {trained_with}, this processor and release give {found}; restore the "
            "chat template the model was trained with, or train again with the new one"
        )


def weights_digest(model: PreTrainedModel) -> str:
    """Checksum of weights and settings; equal for equal models, on any device and with any number of threads.

    It is taken over names, shapes, dtypes and sums of the weights' bits, read as whole numbers of 64 bits and
    multiplied by odd factors that grow with the position. Such sums wrap around and are exact in any order, which sums
    of floats are not; one changed bit always shows. One pass over the weights where they are: nothing is copied to the
    CPU but the sums.

    Args:
        model: a reward model.

    Returns:
        16 hexadecimal digits.

    Raises:
        CheckpointError: a weight is empty, as on a rank where ZeRO-3 keeps it elsewhere.

    Example:
        >>> weights_digest(MultiResponseRewardModel.from_pretrained("rm"))  # doctest: +SKIP
        '5d41402abc4b2a76'
    """
    settings = {key: getattr(model.config, key, None) for key in _SCORING_KEYS}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.numel():
            raise CheckpointError(
                f"the weight {name} is empty, so there is no checksum; under DeepSpeed ZeRO-3 load the model inside "
                "mr_reward.checkpoint.zero3.outside_zero3()"
            )
        entry = (name, list(tensor.shape), str(tensor.dtype), _sums(tensor))
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


@torch.no_grad()
def _sums(tensor: Tensor) -> list[int]:
    """One position-weighted sum for each chunk of 64-bit words, then the bytes that fill no word."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    if data.data_ptr() % 8 or data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64)
    factors = torch.arange(min(_CHUNK, len(words)), device=words.device) * 2 + 1
    sums = [int((chunk * factors[: len(chunk)]).sum()) for chunk in words.split(_CHUNK) if len(chunk)]
    return sums + data[whole:].tolist()


def non_finite_cause(model: nn.Module) -> str:
    """Why scores are not finite: looked up when it has happened."""
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return f"the weights {', '.join(bad[:3])}{more} are not finite; use an earlier checkpoint"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"all weights are finite, so activations overflow in {dtype}; try a wider dtype (float32)"


def align_weights(model: nn.Module) -> None:
    """Move weights on the CPU to aligned memory.

    Weights read from a file lie wherever its header ends, and the CPU's kernels sum in another order when they are not
    aligned. Fresh memory is, and so scores stay equal bit for bit over saving and loading.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def find_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Where a file of a checkpoint is, fetched from the hub if need be; None if there is none."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    try:
        found = cached_file(name, file, revision=revision, **options)
    except OSError:  # no such folder or repository: the loading itself says so
        return None
    return None if found is None else Path(str(found))


def has_file(name: str, file: str, revision: str | None = None) -> bool:
    """Whether a checkpoint has a file."""
    return find_file(name, file, revision) is not None


def safe_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a load: no pickles, and no code from the checkpoint unless it was asked for, loudly then.

    Left open, transformers would ask at the terminal about code, and wait for an answer.
    """
    if options.get("trust_remote_code"):
        logger.warning("trust_remote_code: Python code that comes with %s is run with your rights", name)
    return {**options, "use_safetensors": True, "trust_remote_code": bool(options.get("trust_remote_code"))}


def load_backbone(name: str, **options: Any) -> PreTrainedModel:
    """Load a backbone whose weights are all there; its language-model head is left aside."""
    if reason := why_missing(name, revision=options.get("revision")):
        raise CheckpointError(f"{name}: no backbone with safetensors weights could be loaded: it {reason}")
    if has_file(name, "adapter_config.json", options.get("revision")):  # transformers would load half of it
        raise CheckpointError(
            f"{name}: holds an adapter, expected a whole backbone; merge the adapter with the code that trained it"
        )
    check_shards(name, options.get("revision"))
    options = safe_options(name, options) | {"ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = AutoModel.from_pretrained(name, **options)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{name}: no backbone with safetensors weights could be loaded ({error})") from error
    unexpected = [key for key in info["unexpected_keys"] if not str(key).startswith("lm_head")]
    check_loading_info(name, {**info, "unexpected_keys": unexpected})
    align_weights(model)
    return model.eval()


def load_processor(name: str, revision: str | None = None) -> Any:
    """Load the processor of a vision-language model, or the tokenizer of a text-only one."""
    has_processor = any(has_file(name, file, revision) for file in (PROCESSOR_NAME, "preprocessor_config.json"))
    loader = AutoProcessor if has_processor else AutoTokenizer
    try:
        return loader.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: no processor or tokenizer could be loaded ({error})") from error
