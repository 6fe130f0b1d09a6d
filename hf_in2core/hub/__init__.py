"""The network: checks, retries and commits. Nothing here knows of influence."""
