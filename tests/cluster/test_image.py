"""The container file and the locks it installs from."""

from __future__ import annotations

import re
import shlex
import tomllib
from typing import Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.cluster.filled import CLUSTER
from tests.scanning import REPOSITORY

_PINNED: Final = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)((?: --hash=sha256:[0-9a-f]{64})+)$")
_IMAGE: Final = {  # markers of what the images are
    "python_version": "3.11",
    "python_full_version": "3.11.16",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "os_name": "posix",
    "extra": "",
}


def _lock(variant: str) -> dict[str, Version]:
    """Return the packages a lock pins; every line must pin one, with hashes."""
    text = (CLUSTER / "lock" / f"{variant}.txt").read_text()
    lines = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    pins = [_PINNED.match(re.sub(r"\s+", " ", line).strip()) for line in lines if line.strip()]
    assert None not in pins
    return {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins if pin is not None}


def _required() -> list[Requirement]:
    """Return what the package and its trainings need on the images' platform."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    found = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["train"]]]
    return [each for each in found if each.marker is None or each.marker.evaluate(_IMAGE)]


def _constraints() -> dict[str, Version]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_lock_has_every_dependency_in_a_version_that_is_asked_for(variant: str) -> None:
    lock = _lock(variant)

    for required in _required():
        version = lock[canonicalize_name(required.name)]
        assert required.specifier.contains(version), f"{required}: run `make locks`"


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_lock_has_the_versions_that_are_tested_together(variant: str) -> None:
    lock, constraints = _lock(variant), _constraints()

    tested = {name: Version(lock[name].public) for name in lock.keys() & constraints.keys()}

    assert tested == {name: constraints[name] for name in tested}, "run `make locks`"
    assert len(tested) > 15


def test_variants_differ_in_torchs_build_and_cuda_alone() -> None:
    cpu, cuda = _lock("cpu"), _lock("cuda")

    assert str(cpu.pop("torch")) == f"{cuda.pop('torch')}+cpu"
    assert cpu.items() <= cuda.items()
    more = cuda.keys() - cpu.keys()
    assert {"triton", "nvidia-cudnn-cu13"} <= more
    assert not [name for name in more if not name.startswith(("nvidia-", "cuda-", "triton"))]


def _instructions() -> list[tuple[str, str]]:
    """Return the container file's instructions and their arguments, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (CLUSTER / "Containerfile").read_text(), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    pairs = [line.split(maxsplit=1) for line in lines]
    return [(name, arguments) for name, arguments in pairs]


def test_the_image_starts_from_one_exact_python() -> None:
    bases = [arguments for name, arguments in _instructions() if name == "FROM"]

    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", bases[0])


def test_the_image_installs_nothing_from_an_index_without_a_hash() -> None:
    installs = [
        shlex.split(command)
        for name, arguments in _instructions()
        for command in re.split(r"&&|;", arguments)
        if name == "RUN" and "pip install" in command
    ]

    assert len(installs) == 2
    assert all("--require-hashes" in install or "--no-index" in install for install in installs)
    assert all("--no-deps" in install for install in installs)


def test_the_image_runs_as_a_user_without_rights_and_asks_for_a_token() -> None:
    instructions = _instructions()
    users = [arguments for name, arguments in instructions if name == "USER"]
    variables = dict(pair.split("=", 1) for name, args in instructions if name == "ENV" for pair in shlex.split(args))

    last_run = max(at for at, (name, _) in enumerate(instructions) if name == "RUN")
    assert users == ["1000:1000"]
    assert instructions.index(("USER", "1000:1000")) > last_run  # all that is installed is root's
    assert variables["RAY_AUTH_MODE"] == "token"
    assert variables["HOME"] == "/home/ray"
    assert not [name for name in variables if re.search("KEY|SECRET|PASSWORD", name)]
    assert "ENTRYPOINT" not in dict(instructions)  # `ray up` and KubeRay bring commands of their own


def test_the_image_takes_what_the_ignore_file_lets_through() -> None:
    ignored, *allowed = (CLUSTER / "Containerfile.dockerignore").read_text().split("\n")[1:-1]
    copied = {
        source.partition("/${VARIANT}")[0]
        for name, arguments in _instructions()
        if name == "COPY"
        for source in arguments.split()[:-1]
    }

    assert ignored == "*"
    assert {line[1:] for line in allowed if line.startswith("!")} == copied
    assert all((REPOSITORY / path).exists() for path in copied)
