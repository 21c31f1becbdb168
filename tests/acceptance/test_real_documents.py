"""A folder of real documents goes in with one command, is found by paragraph, and is kept in step with the folder."""

from __future__ import annotations

import inspect
import json
import pydoc
from pathlib import Path

import pytest

from chunkmill import Client, Job, JobState
from tests.acceptance.conftest import Processes
from tests.support import forks
from tests.support.pdf_files import pdf

ROOT = Path(__file__).parents[2]
PAGES = ("search.md", "backup.md", "transactions.md", "retention.md")
SOURCES = ("textwrap", "heapq", "bisect", "json.encoder")
MANUALS = ("shelve", "cmd", "getpass")
LICENCE = "Lizenz für Entwickler.pdf"
PRICES = """Nr;Beschreibung;Preis
7;Coffee mill with a conical burr of steel, grinds beans for the café;49,90
8;Watering can of zinc for the balcony, five litres, made in Gießen;19,50
9;Sleeping bag that keeps you warm down to five degrees below zero, 1 kg;89,00
"""
QUESTIONS = {
    "find only chunks whose metadata has a certain value": "search.md",
    "restore everything on another machine after a disk failure": "backup.md",
    "the job exists if and only if my own transaction commits": "transactions.md",
    "delete vectors of texts that no collection refers to any more": "retention.md",
    "remove the common leading whitespace of every line": "src/textwrap.py",
    "merge several sorted inputs into one sorted output": "src/heapq.py",
    "where to insert an item into a sorted list": "src/bisect.py",
    "how is a float that is not a number written as JSON": "src/json.encoder.py",
    "keep Python objects in a file like a dictionary": "manuals/shelve.html",
    "write a line-oriented command interpreter with a prompt": "manuals/cmd.html",
    "ask for a password without echo": "manuals/getpass.html",
    "somebody sues because of a patent": LICENCE,
    "something to grind coffee beans": "7",
}
"""Questions as people ask them, and the documents that answer them."""


def written(folder: Path) -> None:
    """The folder, with what every machine has that runs these tests."""
    for name in ("src", "manuals", "empty", ".git"):
        (folder / name).mkdir(parents=True)
    for page in PAGES:
        (folder / page).write_text((ROOT / "docs" / page).read_text())
    for name in SOURCES:
        module, _ = pydoc.resolve(name)  # type: ignore[misc]
        (folder / "src" / f"{name}.py").write_text(inspect.getsource(module))
    for name in MANUALS:
        module, _ = pydoc.resolve(name)  # type: ignore[misc]
        page = pydoc.html.page(pydoc.describe(module), pydoc.html.document(module, name))
        (folder / "manuals" / f"{name}.html").write_text(page)
    lines = [line.replace("(", "[").replace(")", "]") for line in (ROOT / "LICENSE").read_text().splitlines()]
    (folder / LICENCE).write_bytes(pdf([lines[at : at + 60] for at in range(0, len(lines), 60)]))
    (folder / "prices.csv").write_text(PRICES, encoding="latin-1")
    (folder / "logo.png").write_bytes(b"\x89PNG")
    (folder / ".git" / "notes.md").write_text("hidden")
    (folder / "again.md").symlink_to("search.md")
    (folder / "passwords.txt").symlink_to("/etc/passwd")


class Folder:
    """The folder and the command that keeps a collection in step with it."""

    def __init__(self, path: Path, processes: Processes, client: Client) -> None:
        self.path = path
        self._env = processes.env
        self._client = client

    def sync(self, *options: str) -> tuple[Job, str]:
        """Enqueue it, and wait for the job. Returns the job and what the command said about the folder."""
        command = [
            "chunkmill.cli", "enqueue", str(self.path), str(self.path / "prices.csv"), "--collection", "real",
            "--chunk", "200", "--overlap", "20", "--encoding", "latin-1", "--id-field", "Nr", "--text-field",
            "Beschreibung", "--sync", "--wait", "--json", *options,
        ]  # fmt: skip
        done = forks.run(command, env=self._env)
        assert done.returncode == 0, done.stderr
        return self._client.job(json.loads(done.stdout)["id"]), done.stderr.replace(f"{self.path}/", "")

    def best(self, question: str, k: int = 3) -> list[str]:
        """The documents of the first hits, from the best on."""
        return [hit.metadata["document"] for hit in self._client.search(question, collection="real", k=k)]

    def ids(self, document: str) -> set[str]:
        of_document = self._client.chunks("real", filter={"document": document}, with_text=False)
        return {chunk.id for chunk in of_document}


@pytest.mark.slow
def test_a_folder_of_real_documents_is_found_by_paragraph_and_kept_in_step(
    processes: Processes, client: Client, tmp_path: Path
) -> None:
    folder = Folder(tmp_path / "real", processes, client)
    written(folder.path)
    processes.worker()
    processes.poller()
    job, said = folder.sync()
    assert (job.state, job.refused, job.repeated, job.truncated, job.dead) == (JobState.COMPLETED, 0, 0, 0, 0)
    assert "16 documents cut into" in said  # the link is one of them, and each row of the table
    assert "passwords.txt is a link that leads out of the folder" in said
    assert "not read because of their kind: 1 .png" in said
    assert client.audit("real").missing == 0

    # No text is left out: the chunks of each document hold all of it, in pieces that the model reads whole.
    for document in (*PAGES, *(f"src/{name}.py" for name in SOURCES)):
        text = (folder.path / document).read_text()
        covered = bytearray(len(text))
        for chunk in client.chunks("real", filter={"document": document}):
            start, end = chunk.metadata["chunk_start"], chunk.metadata["chunk_end"]
            assert chunk.text == text[start:end]
            covered[start:end] = b"\1" * (end - start)
        assert not [text[at] for at, held in enumerate(covered) if not held and not text[at].isspace()], document
    assert {chunk.metadata["page"] for chunk in client.chunks("real", filter={"document": LICENCE})} == {1, 2, 3, 4}

    answers = {question: folder.best(question) for question in QUESTIONS}
    assert {q: answers[q] for q, document in QUESTIONS.items() if document not in answers[q]} == {}
    (price,) = client.search("something to grind coffee beans", collection="real", k=1)
    assert (price.text, price.metadata["Preis"]) == (PRICES.splitlines()[1].split(";")[1], "49,90")

    # Nothing has changed, so nothing is written or embedded.
    again, _ = folder.sync()
    assert (again.new, again.replaced, again.deleted, again.embedded) == (0, 0, 0, 0)
    assert again.unchanged == job.chunks

    # One page gets a paragraph, one goes, one comes, and one cannot be read any more.
    page = (folder.path / "backup.md").read_text()
    middle = page.index("\n\n", len(page) // 2) + 2
    added = "Beekeepers feed their bees with sugar syrup before the winter begins.\n\n"
    (folder.path / "backup.md").write_text(page[:middle] + added + page[middle:])
    (folder.path / "manuals" / "cmd.html").unlink()
    (folder.path / "übung 1.md").write_text("# Mühle\n\nHow the miller dresses the millstones with a mill bill.\n")
    (folder.path / LICENCE).write_bytes(b"%PDF-1.4 and then nothing")
    before = {name: folder.ids(name) for name in ("backup.md", "manuals/cmd.html", LICENCE)}
    changed, _ = folder.sync("--on-invalid", "skip")
    (dead,) = client.dead(changed.id)
    assert (dead.chunk_id, "no PDF file that can be read" in dead.reason) == (LICENCE, True)
    assert folder.ids("manuals/cmd.html") == set() != before["manuals/cmd.html"]
    assert folder.ids(LICENCE) == before[LICENCE] != set()
    assert len(before["backup.md"] - folder.ids("backup.md")) <= 4
    assert folder.best("what do bees eat in the cold season", 1) == ["backup.md"]
    assert folder.best("sharpening a millstone", 1) == ["übung 1.md"]
    assert "manuals/cmd.html" not in folder.best("write a line-oriented command interpreter with a prompt", 10)
    assert client.audit("real").missing == 0
