"""How a rollout server fetches a bucket of weights: from the trainer's address and nowhere else.

    http://ADDRESS:PORT/TOKEN/NUMBER

is all that is ever opened: an address in digits, one of those that the server was started for, a
port that needs no privileges, and a path that only a `BucketServer` has. There is no name to look
up again, and no proxy, redirect or other scheme to follow. What comes is bounded in bytes and in
time. Whatever fails, the answer to the outside is the same; the server's log has the reason.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from io import BytesIO

from torch import nn

from .http import NOT_FETCHED, TRAINER_HOST, hang_up_after, patience_s

logger = logging.getLogger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

URL = re.compile(
    r"http://(?:\[([0-9A-Fa-f:.]{2,45})\]|([0-9.]{7,15})):([0-9]{4,5})"
    r"(/([A-Za-z0-9_-]{43})/[0-9]{1,9})"
)
NAME = re.compile(r"(?!-)[A-Za-z0-9._-]{1,253}")
CONNECT_S = 30.0
CHUNK = 2**20
SMALL_BYTES = 16 * 2**20  # names and shapes of tensors, and buffers, in one update


class NotFetched(RuntimeError):
    """Weights that were offered could not be fetched."""

    def __init__(self) -> None:
        super().__init__(NOT_FETCHED)


def read_hosts(hosts: str) -> list[Network | str]:
    """Networks and host names, from "10.0.0.7, trainer1, 10.1.0.0/16". ValueError for others."""
    read: list[Network | str] = []
    for entry in filter(None, map(str.strip, hosts.split(","))):
        try:
            read.append(ipaddress.ip_network(entry, strict=False))
        except ValueError:
            if not NAME.fullmatch(entry) or entry.replace(".", "").isdigit():
                raise ValueError(
                    f"{TRAINER_HOST} takes host names, addresses and networks (10.0.0.0/8) with "
                    f"commas between, and no ports; got {entry!r}."
                ) from None
            read.append(entry)
    return read


def most_bytes(model: nn.Module, num_workers: int) -> int:
    """Most that all buckets of one update can have: 4 bytes per parameter, and names and shapes.

    A worker holds at least its share of the model, and the trainer has no wider type than float32.
    """
    return 4 * num_workers * sum(p.numel() for p in model.parameters()) + SMALL_BYTES


def fetch(
    url: object, hosts: str, most_bytes: int, wait_s: float = 0.0
) -> tuple[str, memoryview | None]:
    """(the update's token, the bucket), at most `most_bytes` of it; None: there are no more.

    `hosts`: see `read_hosts`; empty: the server's own machine. `wait_s`: that the trainer may take
    to make it. Raises NotFetched.
    """
    with not_fetched(url), connected(url, hosts) as (connection, token, path):
        with hang_up_after(connection.sock, patience_s(0) + wait_s):
            connection.request("GET", path)
            response = connection.getresponse()
        if response.status == 204:
            return token, None
        return token, _body(response, most_bytes, connection.sock)


@contextmanager
def not_fetched(url: object) -> Iterator[None]:
    """Whatever is wrong with a connection to `url` raises NotFetched, and its reason is logged."""
    try:
        yield
    except (OSError, HTTPException, ValueError) as error:
        logger.warning("weights were not fetched from %.200r: %s", url, error)
        raise NotFetched from None


@contextmanager
def connected(url: object, hosts: str) -> Iterator[tuple[HTTPConnection, str, str]]:
    """(a connection to the trainer without a time limit, the update's token, the path)."""
    match = URL.fullmatch(url) if isinstance(url, str) else None
    if match is None:
        raise ValueError("not an address at which a trainer offers weights")
    address = _plain(ipaddress.ip_address(match[1] or match[2]))
    port, path, token = int(match[3]), match[4], match[5]
    if not 1024 <= port < 65536:
        raise ValueError("no trainer listens at that port")
    if not _is_allowed(address, hosts):
        raise ValueError(
            f"{address} is none of {hosts} in {TRAINER_HOST}"
            if hosts
            else f"{address} is another machine's: name it in {TRAINER_HOST}"
        )
    connection = HTTPConnection(str(address), port, timeout=CONNECT_S)
    try:
        connection.connect()
        connection.sock.settimeout(None)
        yield connection, token, path
    finally:
        connection.close()


def _body(response: HTTPResponse, most_bytes: int, sock: socket.socket) -> memoryview:
    size = response.length
    if response.status != 200 or size is None:
        raise ValueError(f"status {response.status}, {size} bytes announced")
    if size > most_bytes:
        raise ValueError(f"{size} bytes, and what is left of the model has {most_bytes} at most")
    body = BytesIO()  # grows as bytes come, and gives them without a copy
    with hang_up_after(sock, patience_s(size)):
        while chunk := response.read(CHUNK):
            body.write(chunk)
    if body.tell() != size:
        raise ValueError(f"{body.tell()} of {size} bytes came in {patience_s(size):.0f} s")
    return body.getbuffer()


def _is_allowed(address: Address, hosts: str) -> bool:
    if address.is_unspecified or address.is_multicast:
        return False
    if not hosts:
        return _is_of_this_machine(address)
    return any(_holds(entry, address) for entry in read_hosts(hosts))


def _holds(entry: Network | str, address: Address) -> bool:
    if not isinstance(entry, str):
        return address in entry
    return any(_plain(ipaddress.ip_address(found)) == address for found in _addresses(entry))


def _addresses(name: str) -> list[str]:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return [str(entry[4][0]).partition("%")[0] for entry in found]


def _is_of_this_machine(address: Address) -> bool:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family) as sock:
            sock.bind((str(address), 0))
    except OSError:
        return False
    return True


def _plain(address: Address) -> Address:
    """::ffff:10.0.0.7 -> 10.0.0.7"""
    return getattr(address, "ipv4_mapped", None) or address
