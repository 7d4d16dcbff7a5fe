"""Corpora, tokenizers and packing: text to fixed-length rows with document boundaries."""

from osdn.data.corpora import open_corpora, open_corpus
from osdn.data.documents import Document
from osdn.data.mixture import MixedDocuments, Mixture
from osdn.data.packing import Batch, Row, TrainingRows, collate, pack
from osdn.data.rows import RankRows, RowSource, validation_rows
from osdn.data.split import TrainingDocuments, held_out_texts
from osdn.data.tokenizers import byte_tokenizer, encode_document, load_tokenizer, vocabulary_size
from osdn.data.workers import WorkerRows, open_rows

__all__ = [
    "Batch",
    "Document",
    "MixedDocuments",
    "Mixture",
    "RankRows",
    "Row",
    "RowSource",
    "TrainingDocuments",
    "TrainingRows",
    "WorkerRows",
    "byte_tokenizer",
    "collate",
    "encode_document",
    "held_out_texts",
    "load_tokenizer",
    "open_corpora",
    "open_corpus",
    "open_rows",
    "pack",
    "validation_rows",
    "vocabulary_size",
]
