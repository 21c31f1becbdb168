"""Where a process can be told to die: around each call of the provider, and around each commit."""

from __future__ import annotations

CALLS = ("upload", "create", "retrieve", "find", "lines", "delete_file", "files_named")
COMMITS = (
    "claim a step",
    "gather",
    "upload",
    "create",
    "create again",
    "submitted",
    "look again later",
    "ended",
    "collect",
    "account",
    "close",
)

WORKER_POINTS = (
    *(f"{call}:{when}" for call in CALLS[:-1] for when in ("before", "after")),
    *(f"{commit}:{when} commit" for commit in COMMITS if commit != "create again" for when in ("before", "after")),
    "lines:middle",
)
"""All that a run without other trouble comes to."""
POLLER_POINTS = ("ring_steps:before", "ring_steps:after", "open_gathering:after", "settle:after")

LOOKS_FOR_RESULTS = 8
"""How often a batch that ended is asked for files that it does not name. Workers do so 60 times, which takes five
hours, and a result file of which every line is missing is not there at all."""
