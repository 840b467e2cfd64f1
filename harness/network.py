"""Which address and interface of this machine other machines reach it by.

Names are not enough: many a machine's own name is 127.0.1.1, or none, for itself.

    python -m harness.network HOST      prints 1 if HOST is this machine, else 0, and the address, if others
                                        can use it
"""

from __future__ import annotations

import ipaddress
import socket
import sys

__all__ = ["address_towards", "interface_towards", "is_here"]

_ANY_PORT = 9  # nothing is sent


def address_towards(host: str) -> str | None:
    """This machine's address from which it speaks to `host`; None if that has none, or no way leads there.
    Sends nothing, but may ask the name server."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as there:
            there.connect(place)
            address: str = there.getsockname()[0]
            return address
    except OSError:
        return None


def is_here(host: str) -> bool:
    """Whether `host` is this machine."""
    own = address_towards(host)
    if host in (socket.gethostname(), socket.getfqdn()) or (own is not None and _is_loopback(own)):
        return True
    try:
        return own is not None and own in {found[4][0] for found in socket.getaddrinfo(host, _ANY_PORT)}
    except OSError:
        return False


def interface_towards(host: str) -> str | None:
    """Name of the network interface by which this machine reaches `host`; None where nothing but this machine
    is reached by it, or no way leads there."""
    address = address_towards(host)
    if address is None or _is_loopback(address):
        return None
    import psutil  # which the guard alone does without

    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name
    return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _main(host: str) -> None:
    address = address_towards(host)
    usable = "" if address is None or _is_loopback(address) else address
    print(int(is_here(host)), usable)


if __name__ == "__main__":
    _main(sys.argv[1])
