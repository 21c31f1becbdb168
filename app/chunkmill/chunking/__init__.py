"""Cuts documents into chunks: texts, Markdown, HTML, PDF files and source code. docs/documents.md has examples.

A chunk is a passage of a document that a model reads whole. It begins and ends at a heading, a paragraph, a line or a
sentence, and its metadata say where it comes from. It needs the extra ``documents``, and no database, worker or torch.
"""

from chunkmill.chunking.chunker import Chunker, Unit
from chunkmill.chunking.document import Block, Document, Kind

__all__ = ["Block", "Chunker", "Document", "Kind", "Unit"]
