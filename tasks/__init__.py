"""What one stage reads, calls and writes, its MLflow run, and the Prefect task around it."""

import os

# Before the first import of prefect, mlflow and torch, which read them once: nothing is reported to anybody, a slow
# machine may take its time to start Prefect's temporary server, and a tracking server that is away is given up after
# seconds. Threads of torch that wait for each other sleep: beside another busy process, spinning took 70 s for 18 s of
# training.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}.items():
    os.environ.setdefault(_name, _value)
