"""The server's handle on a worker: wire messages, client, supervisor, in-process twin."""
