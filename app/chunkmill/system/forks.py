"""Locks in a process that is forked while another thread holds them."""

from __future__ import annotations

import os
import threading


def renew_in_child(owner: object, name: str) -> None:
    """Let every child of a fork of this process begin with a new lock as the attribute ``name`` of ``owner``.

    A child has only the thread that forked. A lock that another thread held at that moment stays locked in it for ever.
    """
    os.register_at_fork(after_in_child=lambda: setattr(owner, name, threading.Lock()))
