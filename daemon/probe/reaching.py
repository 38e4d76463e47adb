"""Why nothing answers at an endpoint, in one sentence: ZMQ itself only tries again."""

from __future__ import annotations

import socket

from ..config.endpoints import Endpoint

_LOOK_S = 1.0


def why_not_reached(endpoint: str) -> str:
    """Looks at the endpoint without ZMQ, for a second at most."""
    place = Endpoint.parse(endpoint)
    try:
        if place.path:
            with socket.socket(socket.AF_UNIX) as plain:
                plain.settimeout(_LOOK_S)
                plain.connect(place.path)
        else:
            socket.create_connection((place.host.strip("[]"), place.port), _LOOK_S).close()
    except socket.gaierror as error:
        return f"{endpoint}: the name of the host cannot be resolved: {error.strerror}"
    except ConnectionRefusedError:
        return f"nothing listens at {endpoint}"
    except FileNotFoundError:
        return f"{endpoint}: there is no such socket: the engine is not running, or runs in another file system"
    except TimeoutError:
        return f"{endpoint} does not answer: is the host up, and the port open in every firewall?"
    except OSError as error:
        return f"{endpoint} cannot be reached: {error.strerror or error}"
    return f"something takes connections at {endpoint} and does not speak ZMQ"
