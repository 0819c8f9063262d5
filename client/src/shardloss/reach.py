"""The reason why a server cannot be reached, found by looking at its address; gRPC says only UNAVAILABLE."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
from queue import Empty, SimpleQueue
from time import monotonic

from shardloss.address import SOCKETS, endpoints, proxy_of, socket_path, split
from shardloss.credentials import Credentials

CONNECT_S, ANSWER_S = 0.5, 1.0  # to connect, and to wait for the first bytes
LOOK_S = 1.9  # of all steps together, and of the name's resolution
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # with an empty SETTINGS frame
SETTINGS_KIND = 4
TLS_ALERT = b"\x15"
MOST_BYTES = 4096
MUTUAL = "pass client_cert_file and client_key_file (--client-cert-file, --client-key-file)"
SLOW = "a gRPC server answers there, but slowly: is it overloaded?"
SILENT = "something accepts connections there, but says nothing: is it the server's port, and is the server overloaded?"
NOBODY = "nothing listens there: is the server running, and is this the address that it printed at its start?"


def why(address: str, credentials: Credentials) -> str:
    """Return what is at an address that gRPC cannot connect to, and what to check; takes at most LOOK_S."""
    found: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=lambda: found.put(seen(address, credentials)), name="look", daemon=True).start()
    try:
        return found.get(timeout=LOOK_S)
    except Empty:  # every step but the name's resolution has a time limit
        return "no answer in time: check the host name, the network's DNS, and firewalls"


def seen(address: str, credentials: Credentials) -> str:
    """Return what is at an address, and what to check."""
    proxy = proxy_of(address)
    if proxy is not None:
        return through_proxy(address, *proxy)
    try:
        with opened(address) as sock:
            return over_tls(sock, address, credentials) if credentials.is_tls else in_plaintext(sock, address)
    except socket.gaierror as error:
        return f"the host name is unknown ({error.strerror}): check its spelling and the network's DNS"
    except TimeoutError:
        return "no answer: is the host up, and does a firewall drop connections to this port?"
    except (OSError, ValueError) as error:  # a name that DNS cannot encode is a ValueError
        if address.startswith("unix:"):
            return at_path(socket_path(address), error)
        reason = getattr(error, "strerror", None) or str(error)
        return NOBODY if isinstance(error, ConnectionRefusedError) else f"{reason}: check the host and the network"


def opened(address: str) -> socket.socket:
    """Connect to an address."""
    if not address.startswith(SOCKETS):
        host, port = split(endpoints(address)[0])
        return socket.create_connection((host, int(port)), CONNECT_S)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(CONNECT_S)
    try:
        sock.connect(socket_path(address))
    except BaseException:
        sock.close()
        raise
    return sock


def at_path(path: str, error: Exception) -> str:
    """Return why the system does not connect to a Unix socket."""
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError as missing:
        return f"there is no socket {path} ({missing.strerror}): check the path, and that the server is running"
    if not is_socket:
        return f"{path} is not a socket: check the path"
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens on the socket {path}: its server has ended"
    return f"the socket {path} cannot be opened ({error}): only the user who runs the server may connect to it"


def answer_to(sock: socket.socket, sent: bytes) -> bytes | None:
    """Return what a peer answers until it pauses, or None if it is silent; an end at once is an empty answer."""
    found, deadline = b"", monotonic() + ANSWER_S
    try:
        sock.sendall(sent)
        while len(found) < MOST_BYTES and not speaks_http2(found):
            sock.settimeout(max(0.01, deadline - monotonic()))
            more = sock.recv(MOST_BYTES)
            if not more:
                break
            found += more
    except TimeoutError:
        return found or None
    except ConnectionError:
        pass
    return found


def speaks_http2(answer: bytes) -> bool:
    """Return True if an answer begins with the SETTINGS frame of HTTP/2."""
    return len(answer) >= 9 and answer[3] == SETTINGS_KIND and answer[5:9] == bytes(4)


def in_plaintext(sock: socket.socket, address: str) -> str:
    """Return what answers a client without TLS."""
    answer = answer_to(sock, PREFACE)
    if answer is None:
        return SILENT
    if speaks_http2(answer):
        return SLOW
    if (not answer or answer.startswith(TLS_ALERT) or b"HTTPS port" in answer) and speaks_tls(address):
        return "the server requires TLS: pass tls=True, or ca_file (--tls, --ca-file)"
    return unexpected(answer)


def unexpected(answer: bytes) -> str:
    """Return what gives such an answer to the first bytes of HTTP/2."""
    if b"metrics port" in answer:
        return "this is the server's metrics port, which only answers scrapes: use its data port"
    if answer.startswith(b"HTTP/") or b"<html" in answer.lower():
        return "a web server (HTTP/1) answers there, and no gRPC server: check the port"
    if not answer:
        return "something accepts connections there and closes them at once: check the port, and any proxy in between"
    return f"something that is not gRPC answers there, beginning with {answer[:20]!r}: check the port"


def speaks_tls(address: str) -> bool:
    """Return True if a peer begins a TLS handshake, with any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with opened(address) as sock, context.wrap_socket(sock):
            return True
    except ssl.SSLError as error:
        return is_alert(error)
    except OSError:
        return False


def is_alert(error: ssl.SSLError) -> bool:
    """Return True if a TLS peer itself ended the handshake."""
    return "ALERT" in (error.reason or "")


def over_tls(sock: socket.socket, address: str, credentials: Credentials) -> str:
    """Return what answers a client with TLS."""
    if address.startswith(SOCKETS):
        return "a Unix socket is not encrypted: leave out tls and the certificate files"
    context = credentials.context()
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(sock, server_hostname=split(endpoints(address)[0])[0]) as tls:
            if tls.selected_alpn_protocol() != "h2":
                return "a server with TLS but without HTTP/2 answers there: check the port, and any proxy in between"
            answer = answer_to(tls, PREFACE)
            if answer == b"":
                return (
                    f"the server ends the connection after the TLS handshake: does it require a certificate? {MUTUAL}"
                )
            return SLOW if answer else SILENT
    except ssl.SSLError as error:
        return refusal(error)
    except ConnectionError:
        return "the connection is closed during the TLS handshake: does the server speak TLS on this port?"


def refusal(error: ssl.SSLError) -> str:
    """Return why a TLS handshake failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "check ca_file (--ca-file), and that the certificate has this host name and has not expired"
        return f"the server's certificate is not accepted ({error.verify_message.rstrip('.')}): {hint}"
    if is_alert(error):
        return f"the server refuses this client's certificate, or requires one ({error.reason}): {MUTUAL}"
    return "the server does not speak TLS on this port: leave out tls and the certificate files, or check the port"


def through_proxy(address: str, variable: str, url: str) -> str:
    """Return what the proxy of the environment says about an address."""
    host, port = split(url.removeprefix("http://").rstrip("/"))
    target = endpoints(address)[0]
    hint = f"add {split(target)[0]} to no_proxy if the server is reached without it"
    what = f"the connection goes through the proxy {url} ({variable} in the environment)"
    try:
        with socket.create_connection((host, int(port or 80)), CONNECT_S) as sock:
            answer = answer_to(sock, f"CONNECT {target} HTTP/1.0\r\nHost: {target}\r\n\r\n".encode()) or b""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return f"{what}, which cannot be reached ({reason}): {hint}"
    line = answer.split(b"\r\n")[0].decode("latin-1")[:60]
    return f"{what}, which answers {line!r}: {hint}"
