"""What an address of the network says about who can reach it. Standard library only, no I/O."""

import ipaddress


def is_loopback(host: str) -> bool:
    """True for this machine's own addresses and the name `localhost`; no name is looked up."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
