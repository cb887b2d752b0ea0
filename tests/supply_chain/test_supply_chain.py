"""What is installed is what is pinned, what is pinned has no known hole, and nothing loads pickles or foreign code."""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import audit
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from tiny_models import family, reward_model

from mr_reward import GroupScorer, MultiResponseReward, MultiResponseRewardModel
from mr_reward.errors import CheckpointError

ADVISORIES = list(audit.read_advisories(audit.LIST))
SOURCES = sorted([*(audit.ROOT / "mr_reward").rglob("*.py"), *(audit.ROOT / "grpo_recipes").rglob("*.py")])
SECRET = "hunter2-0123456789abcdef"


# --- pins ---


def test_the_pins_have_no_known_hole() -> None:
    findings, count = audit.audit(audit.read_pins(audit.PINS), ADVISORIES)
    assert not findings and count == len(ADVISORIES) > 30


def test_what_is_installed_is_pinned() -> None:
    """Every distribution that ours requires here, with all extras that are installed."""
    pins = audit.read_pins(audit.PINS)
    todo, seen = [("mr-reward", ("dev", "eval", "serve"))], set()
    while todo:
        name, extras = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for text in metadata.distribution(name).requires or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                todo.append((canonicalize_name(requirement.name), tuple(requirement.extras)))
    installed = {name: metadata.version(name) for name in seen - {"mr-reward"}}
    assert len(installed) > 60
    wrong = {
        name: version
        for name, version in installed.items()
        # The CUDA libraries come with torch, which is pinned, and differ between machines.
        if not name.startswith(("nvidia-", "cuda-", "triton")) and (name, Version(version).public) not in pins
    }
    assert not wrong, f"installed, but not as pinned: {wrong}"


def imported(path: Path) -> set[str]:
    """What a module imports when it is imported itself, as dotted names."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_a_plain_install_is_enough() -> None:
    """Nothing that a plain install runs imports what comes with an extra, or by way of another package only."""
    declared = tomllib.loads((audit.ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    base = {canonicalize_name(Requirement(line).name) for line in declared}
    homes = metadata.packages_distributions()
    package = [path.relative_to(audit.ROOT) for path in SOURCES if "grpo_recipes" not in path.parts]
    modules = {".".join(path.with_suffix("").parts): imported(audit.ROOT / path) for path in package}
    needs: dict[str, set[str]] = {}
    for name, found in modules.items():
        tops = {one.partition(".")[0] for one in found} - sys.stdlib_module_names - {"mr_reward", "__future__"}
        if lacking := {top for top in tops if not base & set(map(canonicalize_name, homes.get(top, [])))}:
            needs[name] = lacking
    before: set[str] = set()
    while before != set(needs):  # what imports one of these needs the same
        before = set(needs)
        for name, found in modules.items():
            if more := {lack for other in found & before for lack in needs[other]}:
                needs[name] = needs.get(name, set()) | more
    # Loaded on first use, by names for which `exports` tells the extra.
    of_extras = re.compile(r"mr_reward\.(serving\..*|scorers\.(remote|wire)|integrations\.(openrlhf|collector|verl))")
    assert {name: lacking for name, lacking in needs.items() if not of_extras.fullmatch(name)} == {}
    assert needs["mr_reward.scorers.remote"] >= {"httpx2", "pydantic"}


# --- the audit itself ---


def just_below(version: str) -> str:
    return f"{version}.dev0" if Version(version).pre is None else "5.26.0"


@pytest.mark.parametrize("record", ADVISORIES, ids=lambda record: record["id"])
def test_each_advisory_finds_what_it_affects_and_nothing_else(record: dict[str, Any]) -> None:
    (affected,) = record["affected"]
    name = affected["package"]["name"]
    for found in affected["ranges"]:
        first, last = found["events"]
        inside = [just_below(last["fixed"])] + ([first["introduced"]] if first["introduced"] != "0" else ["0.0.1"])
        for version in inside:
            ((finding,), _) = audit.audit([(name, version)], [record])
            assert finding.advisory == record["id"] and last["fixed"] in finding.fixed
        assert audit.audit([(name, last["fixed"])], [record])[0] == []
        assert audit.audit([("another", inside[0])], [record])[0] == []


numbers = st.integers(0, 12)


@given(
    events=st.lists(st.tuples(st.sampled_from(["introduced", "fixed", "last_affected"]), numbers), max_size=5),
    at=numbers,
)
@settings(max_examples=300, deadline=None)
def test_ranges_are_evaluated_as_by_walking_the_versions(events: list[tuple[str, int]], at: int) -> None:
    """Independent: version by version from 0 on, switching on and off; one event a version, as the schema wants."""
    events = list({number: (kind, number) for kind, number in events}.values())
    state = off_after = False
    for version in range(at + 1):
        if off_after:
            state = off_after = False
        for kind, number in events:
            if number == version:
                state = kind == "introduced" or (state if kind == "last_affected" else False)
                off_after = kind == "last_affected"
    record = {
        "id": "X",
        "affected": [
            {
                "package": {"ecosystem": "PyPI", "name": "Some_Name"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{kind: str(number)} for kind, number in events]}],
            }
        ],
    }
    assert bool(audit.audit([("some-name", str(at))], [record])[0]) == state


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, audit.__file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "0 findings" in done.stdout, done.stdout + done.stderr
    (tmp_path / "old.txt").write_text("# old\nTorch==2.5.1\nJinja2==3.1.6  # fine\n")
    done = subprocess.run([*command, "--pins", tmp_path / "old.txt"], capture_output=True, text=True)
    assert done.returncode == 1 and "CVE-2025-32434" in done.stdout and "2 pins" in done.stdout
    export = tmp_path / "export"
    export.mkdir()
    (export / "a.json").write_text(json.dumps({**ADVISORIES[0], "withdrawn": "2026-01-01T00:00:00Z"}))
    done = subprocess.run(
        [*command, "--pins", tmp_path / "old.txt", "--advisories", export], capture_output=True, text=True
    )
    assert done.returncode == 0 and "0 advisories" in done.stdout
    (export / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="b.json: is no record of the OSV schema"):
        list(audit.read_advisories(export))
    (tmp_path / "open.txt").write_text("torch>=2\n")
    with pytest.raises(ValueError, match="line 1: 'torch>=2' pins nothing"):
        audit.read_pins([tmp_path / "open.txt"])


# --- the source ---

# Call -> what has to be among its keyword arguments; None forbids the call.
FORBIDDEN = {
    "pickle.load": None, "pickle.loads": None, "pickle.Unpickler": None, "marshal.load": None, "marshal.loads": None,
    "shelve.open": None, "joblib.load": None, "dill.load": None, "dill.loads": None, "os.system": None, "eval": None,
    "exec": None, "yaml.load": None, "yaml.unsafe_load": None, "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False), "np.load": ("allow_pickle", False),
}  # fmt: skip


def dangerous(source: str) -> list[str]:
    """Calls that unpickle, run text as code, or trust code from elsewhere."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if name in FORBIDDEN:
            needed = FORBIDDEN[name]
            if needed is None or given.get(needed[0]) is not needed[1]:
                found.append(name)
        splat = any(word.arg is None for word in node.keywords)  # of `safe_options`, looked at below
        if name.startswith("Auto") and name.endswith(".from_pretrained") and not splat:
            if given.get("trust_remote_code") is not False:
                found.append(name)
        if given.get("shell") is True or given.get("trust_remote_code") is True:
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(audit.ROOT)))
def test_no_dangerous_call(path: Path) -> None:
    found = dangerous(path.read_text())
    if path.name == "quickstart.py":  # loads what it has just written
        found = [name for name in found if not name.startswith("Auto")]
    assert found == []


def test_dangerous_calls_are_recognised() -> None:
    code = "pickle.loads(b); torch.load(f); torch.load(f, weights_only=True); x(trust_remote_code=True); eval('1')"
    assert sorted(dangerous(code)) == ["eval", "pickle.loads", "torch.load", "x"]
    assert dangerous("AutoModel.from_pretrained(name)") == ["AutoModel.from_pretrained"]
    assert not dangerous("AutoModel.from_pretrained(name, trust_remote_code=False)")
    assert dangerous("subprocess.run('a', shell=True)") and not dangerous("yaml.safe_load(f); model.eval()")


# --- code and pickles of a checkpoint ---


def with_code(folder: Path, proof: Path) -> None:
    """A folder whose configuration and processor ask for code of their own, which would leave a proof."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModel": "own.Own"}
    config["model_type"] = "own-model"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass Own: pass\n")


def test_code_of_a_backbone_is_not_run_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    members = family("llama")
    members.full_model.save_pretrained(tmp_path / "backbone")
    members.processor.save_pretrained(tmp_path / "backbone")
    with_code(tmp_path / "backbone", tmp_path / "proof")
    with pytest.raises(ValueError, match="trust_remote_code"):
        MultiResponseRewardModel.from_backbone(tmp_path / "backbone")
    assert not (tmp_path / "proof").exists()


def test_trusting_code_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = family("llama")
    members.full_model.save_pretrained(tmp_path)
    members.processor.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        MultiResponseRewardModel.from_backbone(tmp_path)
        assert "trust_remote_code" not in caplog.text
        MultiResponseRewardModel.from_backbone(tmp_path, trust_remote_code=True)
    assert f"Python code that comes with {tmp_path} is run with your rights" in caplog.text


def test_only_safetensors_are_loaded(tmp_path: Path) -> None:
    import torch

    reward_model("llama").save_pretrained(tmp_path / "rm")
    weights = tmp_path / "rm" / "model.safetensors"
    torch.save(reward_model("llama").state_dict(), tmp_path / "rm" / "pytorch_model.bin")
    weights.unlink()
    (tmp_path / "rm" / "SHA256SUMS").unlink()
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(CheckpointError, match="no safetensors weights"):
            MultiResponseRewardModel.from_pretrained(tmp_path / "rm", **options)
    members = family("llama")
    members.full_model.save_pretrained(tmp_path / "backbone")
    members.processor.save_pretrained(tmp_path / "backbone")
    torch.save(members.full_model.state_dict(), tmp_path / "backbone" / "pytorch_model.bin")
    (tmp_path / "backbone" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        MultiResponseRewardModel.from_backbone(tmp_path / "backbone")


# --- secrets ---


def test_the_token_is_never_told(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Not in a log, an error, a repr or a pickle, on either side, when it is right and when it is wrong."""
    import pickle

    from http_server import running

    from mr_reward.errors import ScoringServerError
    from mr_reward.scorers.remote import RemoteScorer
    from mr_reward.serving.server import build_app

    told = []
    with caplog.at_level(logging.DEBUG), running(build_app(GroupScorer(reward_model("llama")), token=SECRET)) as url:
        remote = RemoteScorer(url, token=SECRET, deadline=20.0)
        remote.connect()
        reward = MultiResponseReward(server=url, num_generations=2, server_token=SECRET)
        assert len(reward(prompts=["p", "p"], completions=["a", "b"])) == 2
        told += [
            repr(remote),
            repr(vars(remote)),
            repr(reward),
            repr(vars(reward)),
            pickle.dumps(reward).decode("latin-1"),
        ]
        remote.close()
        for wrong in (f"{SECRET}x", None):
            with pytest.raises(ScoringServerError) as refused:
                RemoteScorer(url, token=wrong, deadline=5.0).connect()
            told.append(str(refused.value))
    told.append(caplog.text)
    leaks = [text[:200] for text in told if re.search("hunter2", text)]
    assert not leaks
