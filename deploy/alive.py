"""Check that the process in this container is alive, for health checks: exit with 0 or 1, and print the reason.

python /opt/alive.py http://127.0.0.1:8000/health     the address must answer 200
python /opt/alive.py worker                           this container's Celery worker must answer over the broker
"""

import socket
import sys
import urllib.request

PATIENCE = 5.0


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE) as response:
            return response.status == 200
    except OSError as error:  # URLError and HTTPError are among these
        print(f"{address}: {error}")
        return False


def works(broker: str) -> bool:
    """Return whether the worker answers, or True if the broker is down: a restart would only lose the clip."""
    from celery import Celery
    from kombu.exceptions import OperationalError

    from omnivideo.backends.queue.celery import build_tls_options

    app = Celery(broker=broker)
    app.conf.broker_use_ssl = build_tls_options(broker)
    app.conf.broker_transport_options = {"socket_timeout": PATIENCE, "socket_connect_timeout": PATIENCE}
    try:
        with app.connection(connect_timeout=PATIENCE) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=PATIENCE)
            return bool(app.control.ping([f"celery@{socket.gethostname()}"], PATIENCE, connection=connection))
    except (OperationalError, OSError) as error:
        print(f"the broker is unavailable: {type(error).__name__}")
        return True


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        from omnivideo.settings import load_settings

        well = works(load_settings().broker)  # from its variable, or from the file that another one names
    else:
        well = answers(sys.argv[1])
    sys.exit(not well)
