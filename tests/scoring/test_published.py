"""The authors' weights by name, from a real web server and a cache of this test's own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lfm_scan.errors import CheckpointError
from lfm_scan.scoring import published
from lfm_scan.scoring.published import read_published
from lfm_scan.scoring.weights import read_weights
from lfm_scan.storage import StorageConfig
from tests.servers import Reply, ScriptedServer, free_port

STORAGE = StorageConfig(max_attempts=1)


@pytest.fixture
def weights(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A file that plays the authors', and an empty cache."""
    data = tiny_weights.read_bytes()
    monkeypatch.setattr(published, "PUBLISHED_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return data


def serve(monkeypatch: pytest.MonkeyPatch, reply: Reply) -> ScriptedServer:
    server = ScriptedServer(lambda _: reply)
    monkeypatch.setattr(published, "PUBLISHED_URL", f"{server.endpoint_url}/bs_model.pth")
    return server


def kept(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_published_weights_are_fetched_once_and_then_read_from_the_cache(
    weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(monkeypatch, Reply(body=weights)) as server:
        data, checkpoint = read_weights("published", STORAGE)
        assert read_weights("published", STORAGE)[0] == data == weights
    assert len(server.requests) == 1
    assert [path.relative_to(tmp_path) for path in kept(tmp_path)] == [
        Path("cache", "lfm-scan", f"{checkpoint.sha256}.pth")
    ]


def test_a_damaged_copy_in_the_cache_is_fetched_again(
    weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(monkeypatch, Reply(body=weights)) as server:
        read_published(STORAGE)
        (copy,) = kept(tmp_path)
        copy.write_bytes(weights[:-1])
        assert read_published(STORAGE) == weights
        assert copy.read_bytes() == weights
    assert len(server.requests) == 2


@pytest.mark.usefixtures("weights")
def test_another_file_at_the_url_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        serve(monkeypatch, Reply(body=b"other weights")),
        pytest.raises(CheckpointError, match=rf"another file by now: {hashlib.sha256(b'other weights').hexdigest()}"),
    ):
        read_published(STORAGE)
    assert kept(tmp_path) == []


@pytest.mark.usefixtures("weights")
def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "PUBLISHED_URL", f"http://127.0.0.1:{free_port()}/bs_model.pth")
    with pytest.raises(
        CheckpointError, match=r"cannot be fetched: .*get the file elsewhere \(sha256 .*give its path as weights"
    ):
        read_published(STORAGE)


def test_a_cache_that_cannot_be_written_stops_nobody(
    weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with serve(monkeypatch, Reply(body=weights)) as server:
        assert read_published(STORAGE) == weights
        assert read_published(STORAGE) == weights
    assert len(server.requests) == 2


def test_a_relative_cache_home_is_ignored(weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    with serve(monkeypatch, Reply(body=weights)):
        read_published(STORAGE)
    assert len(list((tmp_path / ".cache" / "lfm-scan").iterdir())) == 1
