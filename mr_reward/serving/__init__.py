"""A reward model behind HTTP: a server that scores groups, and a scorer that asks it.

FastAPI, uvicorn and the HTTP client come with the extra `serve` and are loaded on first use of a name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mr_reward.errors import ConfigurationError

if TYPE_CHECKING:
    from mr_reward.serving.client import RemoteScorer
    from mr_reward.serving.server import ServerLimits, build_app, check_access, serve

__all__ = ["RemoteScorer", "ServerLimits", "build_app", "check_access", "serve"]

_LAZY_NAMES = {
    "RemoteScorer": "mr_reward.serving.client",
    "ServerLimits": "mr_reward.serving.server",
    "build_app": "mr_reward.serving.server",
    "check_access": "mr_reward.serving.server",
    "serve": "mr_reward.serving.server",
}
_EXTRA = ("fastapi", "httpx2", "pydantic", "starlette", "uvicorn")


def __getattr__(name: str) -> Any:
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_LAZY_NAMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise ConfigurationError(
            f"the package {error.name} is not installed, which scoring over HTTP needs; pip install 'mr-reward[serve]'"
        ) from error
