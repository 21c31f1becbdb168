"""``python -P -m chunkmill_workers worker -Q gpu``: Celery's command with our application, safe in any folder.

``celery -A chunkmill_workers`` finds a folder of that name in the current folder first. Here the application is
imported before Celery looks for it.
"""

from __future__ import annotations

import sys

from celery.bin.celery import celery

import chunkmill_workers

if __name__ == "__main__":
    chunkmill_workers.leave_current_folder()  # again, because Celery is imported by now
    celery.main(["-A", "chunkmill_workers", *sys.argv[1:]], prog_name="celery", auto_envvar_prefix="CELERY")
