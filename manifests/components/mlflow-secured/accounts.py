"""Makes the account that steps log in as, or gives it the password that the Secret has: run at each apply."""

import os
import time

from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client

WAIT = 300.0  # seconds for the server to come up


def main() -> None:
    """Wait for the server, then make or mend the account. MLflow's client logs in as the administrator."""
    client = get_app_client("basic-auth", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    name, password = os.environ["PIPELINE_USERNAME"], os.environ["PIPELINE_PASSWORD"]
    until = time.monotonic() + WAIT
    while True:
        try:
            client.create_user(username=name, password=password)
            print(f"{name}: made")
            return
        except MlflowException as error:
            if error.error_code == "RESOURCE_ALREADY_EXISTS":
                client.update_user_password(username=name, password=password)
                print(f"{name}: was there, and has the password of the Secret")
                return
            if time.monotonic() > until:
                raise
            print(f"not yet: {error}")
            time.sleep(5)


if __name__ == "__main__":
    main()
