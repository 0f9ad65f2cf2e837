"""Decide who can reach the page: the address it listens on, and its user and password."""

import errno
import os
import socket
import stat
from pathlib import Path

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHORTEST_PASSWORD = 8
PORTS = range(7860, 7960)  # tried in this order


def credentials(auth: str | None) -> tuple[str, str] | None:
    """Return the user and the password of --auth or of the environment, None without them.

    auth: USER:FILE, where FILE holds the password. Without it they are PAGE_USER and PAGE_PASSWORD.
    Raises ValueError, one line, which never shows what may be a password.
    """
    if auth is not None:
        user, separator, file = auth.partition(":")
        if not user or not separator or not Path(file).is_file():
            raise ValueError(
                "--auth: takes USER:FILE, where FILE is a file that holds the password. A password "
                "itself must not be on a command line, where other users can read it"
            )
        return user, checked_password(read_password(Path(file)), f"--auth: {file}")

    password = os.environ.get("PAGE_PASSWORD")
    if password is None:
        return None
    user = os.environ.get("PAGE_USER")
    if not user:
        raise ValueError("PAGE_USER is missing: the user's name that belongs to PAGE_PASSWORD")
    return user, checked_password(password, "PAGE_PASSWORD")


def read_password(file: Path) -> str:
    """Return the password in a file, its first line. Raises ValueError, one line."""
    is_shared = os.name == "posix" and file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if is_shared:
        raise ValueError(f"--auth: other users may read {file}; run chmod 600 {file}")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError):
        raise ValueError(f"--auth: {file} cannot be read as a text file") from None
    return lines[0].strip() if lines else ""


def checked_password(password: str, source: str) -> str:
    """Return a password. Raises ValueError, one line, if it is short. source: where it is from."""
    if len(password) < SHORTEST_PASSWORD:
        raise ValueError(f"{source}: the password needs {SHORTEST_PASSWORD} characters or more")
    return password


def check_host(host: str, login: tuple[str, str] | None) -> None:
    """Raise ValueError, one line, if other machines could open the page without a password."""
    if host not in LOOPBACK and login is None:
        raise ValueError(
            f"--host {host}: other machines can reach this address; add --auth USER:FILE, or set "
            "PAGE_USER and PAGE_PASSWORD"
        )


def free_port(host: str, port: int | None) -> int:
    """Return the port to listen on: `port`, or the first free one of PORTS.

    Raises ValueError, one line, if it cannot be used.
    """
    for candidate in [port] if port else PORTS:
        failure = try_port(host, candidate)
        if failure is None:
            return candidate
        if failure not in (errno.EADDRINUSE, errno.EACCES):
            raise ValueError(f"--host {host}: is not an address of this machine")
    if port is None:
        raise ValueError(f"all ports from {PORTS[0]} to {PORTS[-1]} are in use; choose a --port")
    raise ValueError(f"--port {port}: is in use or reserved; choose another one, or leave it out")


def try_port(host: str, port: int) -> int | None:
    """Return None if a program can listen on an address and a port, else the error's number."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        return error.errno
    return None
