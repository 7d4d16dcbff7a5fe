"""The one loop of all evaluations: items in, JSON lines out as they come, resumed after a kill."""

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from osdn.errors import UserError
from osdn.system.outside import Malformed, Outside, parse_json, parse_plain

SAMPLES = "samples.jsonl"
Record = dict[str, Any]
PLACES = ("data", "reference")  # in a protocol: what is read there is in the fingerprint
NAMES = ("_name_or_path", "transformers_version")  # of a configuration: they change nothing


class Header(Outside):
    """The first line of a samples file."""

    protocol: Record


class Sample(Outside):
    """A further line; an evaluation says in a class of its own what else it has."""

    id: str

    def lengths(self) -> tuple[int, ...]:
        """Of its lists, where they must be those of every other record."""
        return ()


def fingerprint(model: PreTrainedModel, items: Sequence[Record] = ()) -> str:
    """A digest of what the answers depend on: weights, their dtypes, configuration, and items.

    Not where the model lies, nor on which device.
    """
    digest = blake2b(digest_size=16)
    # A model that was copied or loaded by another version is the same model.
    config = {k: v for k, v in model.config.to_dict().items() if k not in NAMES}
    digest.update(json.dumps([config, list(items)], sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        # Every byte of the weights: a run that trained on must not find its old answers.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def measure(
    out: Path,
    items: Sequence[Record],
    answer: Callable[[list[Record]], list[Record]],
    *,
    protocol: Record,
    batch: int,
    name: str,
    schema: type[Sample] = Sample,
) -> list[Record]:
    """Answer every item, batch by batch; returns the records in the items' order.

    The first line of out/samples.jsonl is the protocol, each further one {"id", ...} of one item,
    written when its batch is done. Items that are there already are not measured again; a last line
    that a kill cut short is dropped.

    Args:
        out: the evaluation's directory, made if need be.
        items: each has "id", unique, and the same on every run.
        answer: measures a batch; one record for each item, without the id.
        protocol: everything that the records depend on; a directory with another one is refused,
            except for PLACES.
        batch: items in a batch.
        name: shown beside the progress bar.
        schema: of a record, as a line of the file.

    Raises:
        UserError: no item, a directory with another protocol or with lines that are not of the
            schema, an unwritable directory.
    """
    if not items:
        raise UserError(f"{name}: the set is empty; there is nothing to measure")
    path = out / SAMPLES
    try:
        out.mkdir(parents=True, exist_ok=True)
        done, size = _read(path, protocol, schema)
        # Batches are made of what is left: their borders do not change the answers.
        left = [item for item in items if item["id"] not in done]
        # Cut to whole lines, then appended to.
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(size)
            file.seek(size)
            if not size:
                _append(file, {"protocol": protocol})
            with tqdm(total=len(items), initial=len(done), desc=name, unit="item") as bar:
                for start in range(0, len(left), batch):
                    some = left[start : start + batch]
                    # Line by line after each batch: a kill costs one batch.
                    for item, record in zip(some, answer(some), strict=True):
                        done[item["id"]] = {"id": item["id"], **record}
                        _append(file, done[item["id"]])
                    bar.update(len(some))
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from error
    return [done[item["id"]] for item in items]


def _append(file: Any, record: Record) -> None:
    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    file.flush()


def _read(path: Path, protocol: Record, schema: type[Sample]) -> tuple[dict[str, Record], int]:
    """The records of a samples file and the bytes of its whole lines; none of a missing file."""
    if not path.exists():
        return {}, 0
    data = path.read_bytes()
    size = data.rfind(b"\n") + 1  # past the last whole line
    lines = data[:size].splitlines()
    if not lines:
        return {}, 0
    try:
        known = parse_plain(lines[0], Header, "line 1")["protocol"]
        done, lengths = {}, set()
        for number, line in enumerate(lines[1:], start=2):
            sample = parse_json(line, schema, f"line {number}")
            lengths.add(sample.lengths())
            if len(lengths) > 1:
                raise Malformed(f"line {number}", "expected lists as long as in the other lines")
            done[sample.id] = parse_plain(line, schema, f"line {number}")
    except Malformed as error:
        raise UserError(
            f"{path}: not a samples file ({error}); move it away or choose another --out"
        ) from error
    # As a file would give it back: tuples are lists there.
    expected = json.loads(json.dumps(protocol))
    names = [name for name in known | expected if name not in PLACES]
    changed = sorted(name for name in names if known.get(name) != expected.get(name))
    if changed:
        raise UserError(
            f"{path}: holds samples measured otherwise ({', '.join(changed)}); choose another --out"
            " or delete the directory"
        )
    return done, size
