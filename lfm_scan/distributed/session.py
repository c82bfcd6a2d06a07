"""Starting Ray, or joining it, without its chatter."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Final

import ray
import ray.data

from lfm_scan.errors import RunError

_CONNECT_TIMEOUT_S: Final = 5
_HOOK: Final = sys.modules.get("ray._private.auto_init_hook")
"""What lets any call connect to Ray, or start one. A Ray that has it elsewhere is left to do so."""

_CONNECTS_ITSELF: Final[bool] = getattr(_HOOK, "enable_auto_connect", True)

_SETTINGS: Final = (
    "target_max_block_size",
    "execution_no_progress_timeout_s",
    "enable_progress_bars",
    "print_on_execution_start",
)
"""Of Ray Data, that a run changes for its time."""


@contextlib.contextmanager
def ray_session(address: str | None, *, debug: bool = False) -> Iterator[bool]:
    """Connect to Ray for the time of a run: a cluster if one is named or this job runs in one, else a local one.

    A Ray that the caller has already connected to is used and left as it is.

    Args:
        address: Of a cluster, or None.
        debug: Let Ray and its workers talk.

    Yields:
        Whether the cluster may get more nodes: a Ray that is started for this run will not.

    Raises:
        RunError: If the cluster cannot be reached.
    """
    if ray.is_initialized():
        with _quiet_data(debug):
            yield True
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        check_reachable(address, "--ray-address")
    level = logging.INFO if debug else logging.ERROR
    _may_connect_itself(_CONNECTS_ITSELF)
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=debug,
            logging_level=level,
        )
    except (ConnectionError, ValueError, RuntimeError) as exc:
        raise RunError(f"cannot reach Ray at {address or 'this machine'}: {str(exc).splitlines()[0]}") from exc
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own there
    try:
        with _quiet_data(debug):
            yield address is not None
    except BaseException:
        # What still runs in a thread would connect again once Ray is left, or start one, and crash with the process.
        _may_connect_itself(False)
        raise
    finally:
        ray.shutdown()


def _may_connect_itself(allowed: bool) -> None:
    if _HOOK is not None:
        _HOOK.enable_auto_connect = allowed  # type: ignore[attr-defined]


def check_reachable(address: str, flag: str) -> None:
    """Fail within seconds where Ray itself would try for many minutes.

    Args:
        address: Of a cluster or its job server.
        flag: That gives it.

    Raises:
        RunError: If nothing listens there.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local" and the like are for Ray to judge
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as exc:
        raise RunError(f"no Ray cluster answers at {address} ({exc.strerror or exc}): check {flag}") from exc


@contextlib.contextmanager
def _quiet_data(debug: bool) -> Iterator[None]:
    """Set up Ray Data for whole-shard blocks, silent unless debugging, and put everything back afterwards."""
    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    before = {name: getattr(context, name) for name in _SETTINGS}
    level = logger.level
    # None: a block is never split, so one shard stays one block.
    context.target_max_block_size = None
    context.execution_no_progress_timeout_s = -1  # --stall-timeout decides, and nodes may be long in coming
    if not debug:
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)
