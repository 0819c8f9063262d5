"""registered HEAD: exit with 0 if the Ray node of this container is registered and alive, as the GCS of HEAD says.

Asking the GCS takes a second of CPU time, so once the node has been found, only its raylet's socket is tried. Each join
of a container has a socket of its own: Ray numbers them raylet, raylet.1, and so on.
"""

import glob
import socket
import sys
from pathlib import Path

SOCKETS = "/tmp/ray/session_*/sockets/raylet*"
FOUND = Path("/tmp/registered")  # names the socket; on a file system that ends with the container


def living() -> set[str]:
    """Return the sockets of this container's raylets that accept connections."""
    found = set()
    for path in glob.glob(SOCKETS):
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                found.add(path)
    return found


def registered(head: str, sockets: set[str]) -> str:
    """Return the one of `sockets` whose node the GCS lists as alive at an address of this container, or ""."""
    from ray._raylet import GcsClient
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    own = set(socket.gethostbyname_ex(socket.gethostname())[2])
    for node in GcsClient(address=head).get_all_node_info(timeout=10).values():
        if node.state == GcsNodeInfo.ALIVE and node.node_manager_address in own and node.raylet_socket_name in sockets:
            return str(node.raylet_socket_name)
    return ""


def is_healthy(head: str) -> bool:
    """Return True if this container's node is registered, and remember its socket."""
    sockets = living()
    if FOUND.exists() and FOUND.read_text() in sockets:
        return True
    found = registered(head, sockets) if sockets else ""
    if found:
        FOUND.write_text(found)
    return bool(found)


if __name__ == "__main__":
    sys.exit(0 if is_healthy(sys.argv[1]) else 1)
