"""The address of a server: its form, whether it is on this machine, and the proxy that gRPC uses to reach it."""

from __future__ import annotations

import os
import re
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import unquote, urlsplit

from shardloss.errors import InvalidArgument

SOCKETS = ("unix:", "unix-abstract:")
MAX_SOCKET_BYTES = 107  # of a socket's path, without the zero byte that ends it
SCHEMES = ("dns:", "ipv4:", "ipv6:")
OTHER_RESOLVERS = ("xds:", "google-c2p:", "passthrough:")
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # in gRPC's order; it knows no others, and none in upper case
DIRECT = ("no_grpc_proxy", "no_proxy")


def checked(address: object) -> str:
    """Return an address in a form that gRPC understands.

    Raises:
        InvalidArgument: it is not host:port, [IPv6 address]:port, unix:path or a target of gRPC; gRPC itself would take
            an unknown scheme for a host, and port 443 for a missing one.
    """
    wrong = problem(address)
    if wrong is not None:
        raise InvalidArgument(f"address = {address!r} {wrong}", field="address")
    return str(address)


def problem(address: object) -> str | None:
    """Return what is wrong with an address and what to write, or None if nothing is."""
    if not isinstance(address, str):
        return "is not text: write 'host:port', such as '127.0.0.1:7070'"
    if any(char.isspace() or not char.isprintable() for char in address):
        return "contains a blank or a control character"
    if address.startswith(SOCKETS):
        return problem_of_socket(address)
    if address.startswith(OTHER_RESOLVERS):
        return None
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", address)
    if scheme and f"{scheme[1]}:" not in SCHEMES:
        rest = re.split(r"[/?#]", address[scheme.end() :])[0].rpartition("@")[2]
        tls = ", with tls=True or ca_file (--tls, --ca-file)" if scheme[1].lower() in ("https", "grpcs") else ""
        return f"begins with {scheme[0]}, but a server is named without a scheme: write {rest!r}{tls}"
    found = (problem_of_endpoint(endpoint) for endpoint in endpoints(address))
    return next((one for one in found if one is not None), None)


def problem_of_socket(address: str) -> str | None:
    """Return what is wrong with the address of a Unix socket, or None."""
    path = address.partition(":")[2]
    if not path.strip("/"):
        return "has no path: write unix:/path/of/the/socket"
    if address.startswith("unix://") and not path.startswith("///"):
        return f"has two slashes: write unix:{path.removeprefix('/')!s} for an absolute path"
    if len(socket_path(address).encode()) > MAX_SOCKET_BYTES:
        return f"has a path of more than {MAX_SOCKET_BYTES} bytes, which no Unix socket can have"
    return None


def problem_of_endpoint(endpoint: str) -> str | None:
    """Return what is wrong with host:port, or None."""
    if endpoint.startswith(("/", "./", "~")):
        return f"looks like the path of a Unix socket: write unix:{endpoint}"
    if endpoint.count(":") > 1 and not endpoint.startswith("["):
        return "is an IPv6 address without brackets: write [ADDRESS]:PORT, such as [::1]:7070"
    host, port = split(endpoint)
    if not port and endpoint.isdigit():
        return f"has no host: write 'host:{endpoint}', such as '127.0.0.1:{endpoint}'"
    if not host or not re.fullmatch(r"[^/@?#]+", host):
        return "has no valid host: write 'host:port', such as '127.0.0.1:7070'"
    return problem_of_port(endpoint, port)


def problem_of_port(endpoint: str, port: str) -> str | None:
    """Return what is wrong with the port of host:port, or None."""
    if not port:
        return (
            f"has no port: write '{endpoint.rstrip(':')}:PORT'; a server's default is 7070, and 7071 for its admin port"
        )
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        return f"has the port {port!r}, which is not a number from 1 to 65535"
    return None


def endpoints(address: str) -> list[str]:
    """Return each host:port of an address that is not a socket."""
    if address.startswith("dns:"):
        return [re.sub(r"^//[^/]*/", "", address.removeprefix("dns:"))]
    for scheme in SCHEMES:
        if address.startswith(scheme):
            return unquote(address.removeprefix(scheme)).removeprefix("///").split(",")
    return [address]


def split(endpoint: str) -> tuple[str, str]:
    """Return the host, without brackets, and the port of host:port, [host]:port or host; a missing port is empty."""
    if endpoint.startswith("["):
        host, _, port = endpoint[1:].partition("]")
        return host, port.removeprefix(":")
    if endpoint.count(":") > 1:
        return endpoint, ""
    host, _, port = endpoint.partition(":")
    return host, port


def socket_path(address: str) -> str:
    """Return the path of a Unix socket's address; an abstract one begins with a zero byte, as in Python's sockets."""
    if address.startswith("unix-abstract:"):
        return "\0" + address.removeprefix("unix-abstract:")
    path = address.removeprefix("unix:")
    return path.removeprefix("//") if path.startswith("///") else path


def is_local(address: str) -> bool:
    """Return True if an address is certainly on this machine: a Unix socket, localhost or a loopback address."""
    if address.startswith(SOCKETS):
        return True
    for scheme in SCHEMES:
        address = address.removeprefix(scheme)
    return is_loopback(split(address.removeprefix("///"))[0])


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach host: localhost or a loopback address, but not a wildcard address."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def is_direct(address: str) -> bool:
    """Return True if an address is never called through a proxy, because it is on this machine."""
    return is_local(address) or split(endpoints(address)[0])[0] in ("0.0.0.0", "::")


def proxy_of(address: str) -> tuple[str, str] | None:
    """Return the variable and the URL, without a password, of the proxy that gRPC uses for an address, or None.

    Source: gRPC's http_proxy_mapper.cc. Of several variables only the first counts, even if it is empty.
    """
    name, url = first_set(PROXIES)
    if is_direct(address) or address.startswith(OTHER_RESOLVERS) or not url.lower().startswith("http://"):
        return None
    host = split(endpoints(address)[0])[0].lower()
    if any(covers(entry.strip().lower(), host) for entry in first_set(DIRECT)[1].split(",")):
        return None
    return name, f"http://{urlsplit(url).netloc.rpartition('@')[2]}"


def first_set(names: tuple[str, ...]) -> tuple[str, str]:
    """Return the first of these environment variables that is set, with its value; empty if none is."""
    name = next((name for name in names if name in os.environ), "")
    return name, os.environ.get(name, "")


def covers(entry: str, host: str) -> bool:
    """Return True if an entry of no_proxy stands for a host: as the end of its name, or as its network."""
    try:
        return ip_address(host) in ip_network(entry, strict=False)
    except ValueError:
        return bool(entry) and host.endswith(entry)
