"""A real Postgres and Redis from wheels, in one data folder, for development, the demo and tests.

>>> stack = Stack()                     # CHUNKMILL_HOME, or the user's data folder
>>> status = stack.up()                 # returns when both servers answer; they outlive this process
>>> status.database_url, status.redis_url
>>> stack.down()                        # stops both cleanly and keeps the data

This is not for production: any process of the same system user can connect without a password. If root starts it, both
servers run as the system user `chunkmill`.
"""

from __future__ import annotations

from chunkmill.embedded.paths import default_home, temporary_folder
from chunkmill.embedded.process import ServerStatus
from chunkmill.embedded.stack import Stack, StackStatus

__all__ = ["ServerStatus", "Stack", "StackStatus", "default_home", "temporary_folder"]
