"""Run the gateway: `python gateway.py` is `python -m fleet_client.gateway`."""

from fleet_client.gateway import run

if __name__ == "__main__":
    run()
