-- PostgreSQL makes the database of MLflow itself; this one is Prefect's.
CREATE DATABASE prefect;
