"""The JSON that is stored: its forms, and what is checked when it is read back.

`CommitManifest` stands in a commit and, as all that is `Sealed`, carries its own digest, so that a flipped byte
anywhere in it shows. `Manifest` stands in a published checkpoint and is what a pull trusts, so it is checked as if a
stranger had written it: plain base names, no duplicates, hexadecimal digests, an id that says the same as its fields.
`Pointer` is latest.json and best.json.

Fields that a later minor version adds are passed over; a higher `format_version` is an error that says what to do.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from anytimed.contracts import CorruptError, Evaluation, Json, Refused

FORMAT_VERSION = 1
MANIFEST_BYTES = 16 << 20
"""No manifest of ours comes near it; more is not read."""

POINTER_BYTES = 1 << 20
CHECKPOINTS = "checkpoints"
"""The folder of a published prefix that holds one folder a checkpoint."""
MANIFEST_NAME = "manifest.json"
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""What libraries load by unpickling; no checkpoint of ours holds any."""

_ID = re.compile(r"([0-9]{5,9})-([0-9]{6,12})-([0-9]{10,15})")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class NewerFormat(Refused):
    """Written by a later version of anytimed; passing it over silently would lose what came after."""


class CheckpointId(NamedTuple):
    """What a published checkpoint is called. Ordered by (term, seq): a rollback lowers the step."""

    term: int
    seq: int
    step: int

    def __str__(self) -> str:
        return f"{self.term:05d}-{self.seq:06d}-{self.step:010d}"

    @property
    def order(self) -> tuple[int, int]:
        return self.term, self.seq

    @staticmethod
    def parse(text: str) -> CheckpointId:
        """Raises ValueError on anything but the one spelling that `str` gives."""
        match = _ID.fullmatch(text)
        found = CheckpointId(*map(int, match.groups())) if match else None
        if found is None or str(found) != text:
            raise ValueError(
                f"{text[:80]!r} is no checkpoint id; expected <term>-<seq>-<step>, as 00001-000002-0000000300"
            )
        return found


def base_name(name: str) -> str:
    """`name`, if it is safe to create in any folder: no separators, no leading dot or dash, ASCII, at most 200
    characters.

    Raises ValueError.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name[:80]!r} is no plain file name; allowed are letters, digits and _ . + - (not first: . + -)"
        )
    return name


def _id(text: str) -> str:
    CheckpointId.parse(text)
    return text


def _sha256(text: str) -> str:
    if not _SHA256.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is no SHA-256 in lower-case hexadecimal")
    return text


Count = Annotated[int, Field(ge=0, lt=2**63)]
Sha256 = Annotated[str, AfterValidator(_sha256)]
BaseName = Annotated[str, AfterValidator(base_name)]
Id = Annotated[str, AfterValidator(_id)]


class FileEntry(BaseModel):
    """One stored file: base name, size in bytes, SHA-256 (hex) of its content."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    name: BaseName
    size: Annotated[int, Field(ge=0, lt=2**50)]
    sha256: Sha256


class Stored(BaseModel):
    """What the forms share: a version that is looked at first, and errors that name the place."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    form: ClassVar[str]
    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION

    def to_bytes(self) -> bytes:
        """NaN and Inf, for which JSON has no word, become null: a skipped step's loss must not stop an export."""
        return json.dumps(self.model_dump(mode="json"), allow_nan=False, indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Raises CorruptError naming `where` and the fields, NewerFormat."""
        try:
            told = from_json(data, allow_inf_nan=False)
            version = told.get("format_version") if isinstance(told, dict) else None
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise NewerFormat(
                    f"{where}: {cls.form} of format {version}, this anytimed reads up to {FORMAT_VERSION}: "
                    "made by a newer anytimed: pip install -U anytimed"
                )
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'whole'}: {e['msg']}" for e in error.errors()[:3])
            raise CorruptError(f"{where}: no valid {cls.form}: {first}") from error
        except ValueError as error:
            raise CorruptError(f"{where}: no valid {cls.form}: {error}") from error


class Sealed(Stored):
    """A form that carries the digest of its own content, so that a flipped byte anywhere in it shows."""

    def to_bytes(self) -> bytes:
        told = self.model_dump(mode="json")
        return _canonical({**told, "digest": hashlib.sha256(_canonical(told)).hexdigest()}) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        # The digest first: a flipped byte in the version must read as damage, not as a later version.
        try:
            told = from_json(data)
            found = told.pop("digest")
            expected = hashlib.sha256(_canonical(told)).hexdigest()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"{where}: no JSON object with its own digest ({error})") from error
        if found != expected:
            raise CorruptError(f"{where}: the manifest's own digest is {found}, its content has {expected}")
        return super().from_bytes(data, where)


def unique(files: list[FileEntry], reserved: str) -> list[FileEntry]:
    """`files`, if no name comes twice and none is the manifest's own. Raises ValueError."""
    seen = {reserved.casefold()}
    for entry in files:
        # Folded: on a file system without case, the second would overwrite the first.
        if entry.name.casefold() in seen:
            raise ValueError(f"file {entry.name!r} is listed twice, or is the manifest itself")
        seen.add(entry.name.casefold())
    return files


class Manifest(Stored):
    """manifest.json of a published checkpoint. `evaluation` is the latest one at the time, of its own step."""

    form: ClassVar[str] = "checkpoint manifest"

    id: Id
    run_id: str
    term: Count
    seq: Count
    step: Count
    tokens: Count
    created: str
    """UTC, ISO 8601; for people and for retention, it orders nothing."""
    created_s: float
    """The same in seconds since 1970."""
    files: Annotated[list[FileEntry], Field(min_length=1, max_length=10_000)]
    optimizer: Json
    evaluation: Evaluation | None
    config_digest: str
    parent: Id | None
    interventions: list[Any]
    lineage: dict[str, Any]
    flags: list[str]
    sequence_length: Annotated[int, Field(ge=1)] | None = None
    """What it was trained on at a time, in tokens; its config.json says only how much it could take."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        expected = str(CheckpointId(self.term, self.seq, self.step))
        if self.id != expected:
            raise ValueError(f"id {self.id} does not say term, seq and step, which are {expected}")
        unique(self.files, MANIFEST_NAME)
        pickled = [entry.name for entry in self.files if entry.name.lower().endswith(PICKLED)]
        if pickled:
            raise ValueError(f"{pickled[0]!r} would be loaded by unpickling, which runs code; expected safetensors")
        return self

    @property
    def order(self) -> tuple[int, int]:
        return self.term, self.seq

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.files)


class Pointer(Stored):
    """latest.json, best.json: which checkpoint, and the digest of its manifest's bytes."""

    form: ClassVar[str] = "pointer"

    id: Id
    step: Count
    tokens: Count
    manifest_sha256: Sha256
    created: str
    evaluation: Evaluation | None

    @property
    def order(self) -> tuple[int, int]:
        return CheckpointId.parse(self.id).order

    @staticmethod
    def to(manifest: Manifest, data: bytes) -> Pointer:
        """The pointer to a manifest whose stored bytes are `data`."""
        return Pointer(
            id=manifest.id,
            step=manifest.step,
            tokens=manifest.tokens,
            manifest_sha256=hashlib.sha256(data).hexdigest(),
            created=manifest.created,
            evaluation=manifest.evaluation,
        )


class CommitManifest(Sealed):
    """MANIFEST.json of a commit. `parent` is the seq of the commit that this state grew from."""

    form: ClassVar[str] = "commit manifest"

    run_id: str
    seq: Count
    term: Count
    step: Count
    parent: Count | None
    created: str
    world_size: Annotated[int, Field(ge=1)] = 1
    files: Annotated[list[FileEntry], Field(min_length=1, max_length=100_000)]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        unique(self.files, "MANIFEST.json")
        return self

    @property
    def order(self) -> tuple[int, int]:
        return self.term, self.seq


def _canonical(told: Json) -> bytes:
    return json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
