"""Where a server listens: a port or a Unix socket, with or without TLS."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nbllm.errors import InvalidRequestError

LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # and how to reach them

_BACKLOG = 2048
_DEFAULT_HOST = "127.0.0.1"
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM form.

    Attributes:
        certfile: the server's certificate, and those between it and its authority.
        keyfile: its key, if it is not in the same file.
        ca_certs: authorities that a client must show a certificate of, or None.
    """

    certfile: Path
    keyfile: Path | None = None
    ca_certs: Path | None = None

    @staticmethod
    def choose(
        keyfile: str | Path | None, certfile: str | Path | None, ca_certs: str | Path | None
    ) -> Tls | None:
        """What `serve` was asked for; None is plain HTTP.

        Raises:
            InvalidRequestError: a file is missing or no PEM, or the certificate is not given.
        """
        names = {"ssl_keyfile": keyfile, "ssl_certfile": certfile, "ssl_ca_certs": ca_certs}
        paths = {name: Path(value) for name, value in names.items() if value is not None}
        if not paths:
            return None
        for name, path in paths.items():
            if not path.is_file():
                raise InvalidRequestError(f"there is no file {path}", parameter=name)
        if "ssl_certfile" not in paths:
            raise InvalidRequestError(
                f"{min(paths)} needs the certificate too: ssl_certfile", parameter="ssl_certfile"
            )
        tls = Tls(paths["ssl_certfile"], paths.get("ssl_keyfile"), paths.get("ssl_ca_certs"))
        tls._check()
        return tls

    def uvicorn_options(self) -> dict[str, Any]:
        """Arguments of `uvicorn.Config`."""
        return {
            "ssl_certfile": str(self.certfile),
            "ssl_keyfile": None if self.keyfile is None else str(self.keyfile),
            "ssl_ca_certs": None if self.ca_certs is None else str(self.ca_certs),
            "ssl_cert_reqs": ssl.CERT_NONE if self.ca_certs is None else ssl.CERT_REQUIRED,
        }

    def client_context(self) -> ssl.SSLContext:
        """For clients of this process: it trusts this very certificate, and no other."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # The certificate may be for a name that does not lead to this machine.
        context.check_hostname = False
        own = _CERTIFICATE.search(self.certfile.read_text(encoding="ascii", errors="replace"))
        assert own is not None  # it was loaded before
        context.load_verify_locations(cadata=own[0])
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context

    def _check(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:  # without a password, a key that has one would ask at the terminal
            context.load_cert_chain(self.certfile, self.keyfile, password=lambda: "")
        except (OSError, ValueError) as error:
            name = "ssl_certfile" if self.keyfile is None else "ssl_keyfile"
            raise InvalidRequestError(
                f"{self.certfile} with {self.keyfile or 'the key in it'} can't be used ({error}); "
                "both must be PEM, belong together and have no password",
                parameter=name,
            ) from error
        if self.ca_certs is not None:
            try:
                context.load_verify_locations(self.ca_certs)
            except (OSError, ValueError) as error:
                raise InvalidRequestError(
                    f"{self.ca_certs} has no certificates in PEM form ({error})",
                    parameter="ssl_ca_certs",
                ) from error


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens; the port comes with `bind`, as it may be any.

    Attributes:
        host: of the machine; unused with `uds`.
        uds: path of a Unix socket, or None.
        tls: files for HTTPS, or None for HTTP.
    """

    host: str = _DEFAULT_HOST
    uds: Path | None = None
    tls: Tls | None = None

    @staticmethod
    def choose(host: str, port: int, uds: str | Path | None, tls: Tls | None) -> Address:
        """What `serve` was asked for.

        Raises:
            InvalidRequestError: there are both a Unix socket and a host or a port.
        """
        if uds is None:
            return Address(host, None, tls)
        for name, is_given in (("port", port != 0), ("host", host != _DEFAULT_HOST)):
            if is_given:
                raise InvalidRequestError(
                    f"a Unix socket (uds) has no {name}: pass one of them", parameter=name
                )
        if not hasattr(socket, "AF_UNIX"):
            raise InvalidRequestError("this system has no Unix sockets", parameter="uds")
        return Address(host, Path(uds).absolute(), tls)

    @property
    def is_local(self) -> bool:
        """Whether it is reached from this machine only."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def url(self, port: int) -> str:
        """What clients of this machine ask."""
        scheme = "http" if self.tls is None else "https"
        if self.uds is not None:
            return f"{scheme}://localhost"
        return f"{scheme}://{in_url(WILDCARDS.get(self.host, self.host))}:{port}"

    def bind(self, port: int) -> socket.socket:
        """A listening socket of our own: no other process can take the address in between.

        Raises:
            InvalidRequestError: the address is taken, or is none.
        """
        return self._bind_port(port) if self.uds is None else _bind_path(self.uds)

    def release(self) -> None:
        """Remove the file of a Unix socket, before its socket is closed."""
        if self.uds is not None:
            self.uds.unlink(missing_ok=True)

    def _bind_port(self, port: int) -> socket.socket:
        family: Any = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((self.host, port))
            bound.listen(_BACKLOG)  # else somebody else may still bind it too
        except (OSError, OverflowError) as error:
            bound.close()
            reason = getattr(error, "strerror", None) or error
            raise InvalidRequestError(
                f"{self.host}:{port} can't be bound ({reason}); pass another port, or 0 for a "
                "free one",
                parameter="port",
            ) from error
        return bound


def in_url(host: str) -> str:
    """IPv6 addresses stand in brackets, in URLs and in the Host header."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def check_root_path(root_path: str) -> str:
    """The path under which a proxy shows the server, without a slash at its end.

    Raises:
        InvalidRequestError: it is no path.
    """
    if root_path and not re.fullmatch(r"(/[\w.~@+-]+)*/?", root_path, re.ASCII):
        raise InvalidRequestError(
            "must be a path as /models/llm: it starts with a slash", parameter="root_path"
        )
    return root_path.rstrip("/")


def check_origins(origins: Sequence[str] | None, *, has_key: bool) -> tuple[str, ...]:
    """Origins of web pages that may ask the server.

    Raises:
        InvalidRequestError: one is no origin, or any may come and there is no key.
    """
    if isinstance(origins, str):
        raise InvalidRequestError("must be a list of origins", parameter="allowed_origins")
    for origin in origins or ():
        if origin != "*" and not _is_origin(origin):
            raise InvalidRequestError(
                f"{origin!r} is no origin, as https://nb.example:8000", parameter="allowed_origins"
            )
        if origin == "*" and not has_key:
            raise InvalidRequestError(
                "any web page could use the server: '*' needs an api_key",
                parameter="allowed_origins",
            )
    return tuple(origins or ())


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return bool(parts.scheme and parts.netloc) and text == f"{parts.scheme}://{parts.netloc}"


def _bind_path(path: Path) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead_socket(path)
        bound.bind(str(path))
        # Before it listens, so that nobody comes in between: it is for this user alone.
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise InvalidRequestError(
            f"{path} can't be bound ({error.strerror or error})", parameter="uds"
        ) from error
    except BaseException:
        bound.close()
        raise
    return bound


def _remove_dead_socket(path: Path) -> None:
    """Remove what a server that ended in haste has left; nothing else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InvalidRequestError(
            f"{path} is there, and is no socket: it is not replaced", parameter="uds"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise InvalidRequestError(f"another server listens on {path}", parameter="uds")
