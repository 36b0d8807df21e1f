"""Composition of stages into flows, and the command line."""

# Its defaults must be in the environment before prefect and mlflow are imported.
import tasks as tasks
