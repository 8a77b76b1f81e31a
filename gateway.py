"""Run the gateway: python gateway.py is python -m fleet_client.gateway."""

from fleet_client.flags import run_main
from fleet_client.gateway import main

if __name__ == "__main__":
    run_main(main)
