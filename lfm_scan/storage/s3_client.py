"""Making S3 clients: timeouts, addressing, and credentials that renew themselves."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import boto3
import botocore
import botocore.exceptions
import botocore.session
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    CredentialProvider,
    CredentialResolver,
    DeferredRefreshableCredentials,
)
from botocore.utils import parse_timestamp

from lfm_scan.errors import ConfigError
from lfm_scan.options import StorageConfig
from lfm_scan.storage.s3_retry import Health, Persistence
from lfm_scan.storage.traffic import watch_s3

_DEFAULT_REGION: Final = "us-east-1"
_ROLE_SESSION: Final = "lfm-scan"
_QUICK_ATTEMPTS: Final = 5
_QUICK_CONNECT_TIMEOUT_S: Final = 2.0
_QUICK_READ_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True)
class Client:
    """A client of one store, shared by all threads of a process.

    Attributes:
        boto: boto3's client. It makes one try a request, and slows down when the store asks it to.
        persistence: Makes the other tries.
    """

    boto: Any
    persistence: Persistence


def open_client(config: StorageConfig, *, patient: bool) -> Client:
    """Return this process's client for a store.

    Args:
        config: How to reach it.
        patient: Whether it goes on for long, or answers within seconds.

    Raises:
        ConfigError: If the profile does not exist.
        BotoCoreError: If there are no credentials.
    """
    # Making a client is not thread-safe in boto3, using one is.
    with _lock:
        return _cached_client(config, patient)


def forget_clients() -> None:
    """Drop all clients: they keep the credentials they were made with."""
    _cached_client.cache_clear()


_lock = threading.Lock()


@functools.lru_cache(maxsize=8)
def _cached_client(config: StorageConfig, patient: bool) -> Client:
    session = _session(config, botocore.session.Session())
    region = config.region or session.region_name or _DEFAULT_REGION
    if config.assume_role is not None:
        session = _in_role(session, config, region, patient=patient)
    if not config.anonymous and session.get_credentials() is None:
        # Raised, not cached: a metadata service that was late may answer the next time.
        raise botocore.exceptions.NoCredentialsError
    boto = _s3_client(session, config, region, patient=patient)
    return Client(
        boto,
        Persistence(
            store=boto.meta.endpoint_url,
            health=Health(),
            max_attempts=config.max_attempts if patient else _QUICK_ATTEMPTS,
            outage_patience=config.outage_patience if patient else None,
        ),
    )


def _s3_client(session: Any, config: StorageConfig, region: str, *, patient: bool) -> Any:  # noqa: ANN401
    settings = Config(
        # Tries are counted in one place, ours. What adaptive adds to standard: told to slow down, it does.
        retries={"mode": "adaptive", "total_max_attempts": 1},
        **_timeouts(config, patient=patient),
        max_pool_connections=config.max_connections,
        # We send Content-MD5 and check ETags; the newer trailing checksums fail on some compatible stores.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": config.addressing},
        signature_version=botocore.UNSIGNED if config.anonymous else None,
        user_agent_extra="lfm-scan",
    )
    try:
        client = session.client("s3", endpoint_url=config.endpoint_url, region_name=region, config=settings)
    except ValueError as exc:
        raise ConfigError(f"--endpoint-url {config.endpoint_url} or --region {region}: {exc}") from exc
    watch_s3(client)
    return client


def _session(config: StorageConfig, core: Any) -> Any:  # noqa: ANN401 - boto3 has no types
    core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_timestamp)
    try:
        return boto3.session.Session(botocore_session=core, profile_name=config.profile)
    except botocore.exceptions.ProfileNotFound as exc:
        raise ConfigError(f"--profile {config.profile}: the AWS configuration files have no such profile") from exc


def _parse_timestamp(value: Any) -> datetime:  # noqa: ANN401
    """Return a time in UTC. boto3's own parser takes more than half of the time that listing takes."""
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        moment = parse_timestamp(value)
    return moment.astimezone(UTC)


def _timeouts(config: StorageConfig, *, patient: bool) -> dict[str, float]:
    if patient:
        return {"connect_timeout": config.connect_timeout, "read_timeout": config.read_timeout}
    return {
        "connect_timeout": min(config.connect_timeout, _QUICK_CONNECT_TIMEOUT_S),
        "read_timeout": min(config.read_timeout, _QUICK_READ_TIMEOUT_S),
    }


def _in_role(session: Any, config: StorageConfig, region: str, *, patient: bool) -> Any:  # noqa: ANN401
    """Return a session whose credentials are the role's, fetched when first needed and renewed before they expire."""
    source = session.get_credentials()
    if source is None:
        raise botocore.exceptions.NoCredentialsError
    create_client = functools.partial(
        botocore.session.Session(profile=config.profile).create_client,
        region_name=region,
        config=Config(retries={"mode": "standard"}, **_timeouts(config, patient=patient)),
    )
    extra_args = {"RoleSessionName": _ROLE_SESSION}
    if config.external_id is not None:
        extra_args["ExternalId"] = config.external_id
    fetcher = AssumeRoleCredentialFetcher(create_client, source, config.assume_role, extra_args)
    credentials = DeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")

    class Provider(CredentialProvider):  # type: ignore[misc]
        METHOD = "assume-role"

        def load(self) -> DeferredRefreshableCredentials:
            return credentials

    role = botocore.session.Session()
    role.register_component("credential_provider", CredentialResolver([Provider()]))
    return _session(config, role)
