"""Public preference data sets -> ranked groups: those of the paper's training mixture.

Written against the published schemas. A converter is a function from one row to a `ResponseGroup`; a row that does not
fit the schema is an error that names the field, a row without a preference raises `SkippedRow` with a reason.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from mr_reward.data.converters.base import Convert, Converter, Row, SkippedRow
from mr_reward.data.converters.conversion import Conversion
from mr_reward.data.converters.llava_critic import llava_critic
from mr_reward.data.converters.reading import Rows, read_rows
from mr_reward.data.converters.text import AXES, chat_pair, nectar, pku_saferlhf
from mr_reward.data.converters.vision import make_mm_rlhf, povid, rlaif_v, vlfeedback, wildvision
from mr_reward.errors import ConfigurationError

__all__ = ["AXES", "CONVERTERS", "Conversion", "Converter", "Rows", "SkippedRow", "get_converter", "read_rows"]


def _plain(convert: Convert) -> Callable[[Iterable[Row]], Convert]:
    """A converter that needs no first look at the data."""
    return lambda rows: convert


_ALL = (
    Converter("mm_rlhf", "yifanzhang114/MM-RLHF", "see its page", make_mm_rlhf),
    Converter("llava_critic", "lmms-lab/llava-critic-113k", "apache-2.0", _plain(llava_critic), config="pairwise"),
    Converter("rlaif_v", "openbmb/RLAIF-V-Dataset", "cc-by-nc-4.0", _plain(rlaif_v)),
    Converter("vlfeedback", "MMInstruction/VLFeedback", "see its page", _plain(vlfeedback)),
    Converter("povid", "YiyangAiLab/POVID_preference_data_for_VLLMs", "see its page", _plain(povid)),
    Converter("wildvision", "WildVision/wildvision-battle", "odc-by", _plain(wildvision), split="test"),
    Converter(
        "tulu",
        "allenai/llama-3.1-tulu-3-8b-preference-mixture",
        "odc-by, with terms of its parts",
        _plain(functools.partial(chat_pair, source="tulu")),
    ),
    Converter(
        "skywork",
        "Skywork/Skywork-Reward-Preference-80K-v0.2",
        "see its page",
        _plain(functools.partial(chat_pair, source="skywork")),
    ),
    Converter("nectar", "berkeley-nest/Nectar", "apache-2.0, not to compete with OpenAI", _plain(nectar)),
    Converter("pku_saferlhf", "PKU-Alignment/PKU-SafeRLHF", "cc-by-nc-4.0", _plain(pku_saferlhf)),
)
CONVERTERS: Mapping[str, Converter] = MappingProxyType({converter.name: converter for converter in _ALL})
"""By name."""


def get_converter(name: str, *, axis: str | None = None) -> Converter:
    """The converter called `name`.

    Args:
        name: a key of `CONVERTERS`.
        axis: for `pku_saferlhf`: `agree` (default), `better` or `safer`.

    Returns:
        The converter.

    Raises:
        ConfigurationError: unknown name or axis, or an axis for another data set.
    """
    if name not in CONVERTERS:
        raise ConfigurationError(f"unknown data set {name!r}, expected one of {', '.join(CONVERTERS)}")
    if axis is None:
        return CONVERTERS[name]
    if name != "pku_saferlhf" or axis not in AXES:
        raise ConfigurationError(
            f"got axis {axis!r} with {name!r}; only pku_saferlhf has axes, one of {', '.join(AXES)}"
        )
    converter = CONVERTERS[name]
    make = _plain(functools.partial(pku_saferlhf, axis=axis))
    return Converter(name, converter.hub_id, converter.licence, make, converter.config, converter.split)
