"""What the corpora and tokenizers that are named on the Hugging Face Hub share."""

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies


def hub_is_reachable() -> bool:
    """Whether the Hub's host name resolves (or a proxy is set, which then does the resolving).

    Asked first, because the client library otherwise retries for 24 to 48 s, a warning each time,
    before it says that there is no network.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    # Behind a proxy names need not resolve here.
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
